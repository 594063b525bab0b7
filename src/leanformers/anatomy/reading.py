"""Reading a model by its family's entry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from leanformers.anatomy.family import AttentionPaths, Family, FeedForwardPaths, StackPaths
from leanformers.anatomy.parts import (
    Attention,
    FeedForward,
    Layer,
    Module,
    Norm,
    Projection,
    linear_shape,
)
from leanformers.errors import LeanError


def has(module: nn.Module, path: str) -> bool:
    """Whether a module stands at ``path``."""
    try:
        return isinstance(module.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def read_layers(base: Module, stack: StackPaths, family: Family) -> Iterator[Layer]:
    """The layers of a stack, none where the model lacks it (T5's encoder alone, BART's decoder alone).

    Raises:
        LeanError: a layer lacks a part that the entry names.
    """
    if not has(base, stack.layers):
        return
    config = base.config
    for index, module in enumerate(base.get_submodule(stack.layers)):
        path = f"{stack.layers}.{index}"
        where = _standing(module, stack.attention, _attention_modules, f"attention of {path}", family)
        cross = None
        if stack.cross_attention is not None and has(module, stack.cross_attention.module):
            cross = _attention(base, module, path, stack.cross_attention, causal=False, cross=True)
        norms = tuple(
            Norm(
                _join(path, norm.path),
                module.get_submodule(norm.path),
                "pre" if norm.pre_if and getattr(config, norm.pre_if) else norm.place,
                norm.reads,
            )
            for norm in stack.norms
            if has(module, norm.path) and not isinstance(module.get_submodule(norm.path), nn.Identity)
        )
        yield Layer(
            path=path,
            module=module,
            stack=stack.name,
            index=index,
            attention=_attention(base, module, path, where, causal=stack.causal, cross=False),
            cross_attention=cross,
            feed_forward=_feed_forward(base, module, path, stack, family),
            norms=norms,
            parallel=bool(stack.parallel_if and getattr(config, stack.parallel_if)),
        )


def stack_norms(base: Module, stack: StackPaths) -> Iterator[Norm]:
    """The norms around a stack: before its first layer (``embedding``) and after its last (``final``)."""
    final = stack.final_norm_if is None or bool(getattr(base.config, stack.final_norm_if))
    places = [(path, "embedding") for path in stack.embedding_norms]
    if stack.final_norm:
        places.append((stack.final_norm, "final" if final else "embedding"))
    for path, place in places:
        if has(base, path):
            yield Norm(path, base.get_submodule(path), place, stack.name)


def head_dim_of(module: Module) -> int:
    """Head size that an attention module works with; it stays when heads are dropped."""
    for name in ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    raise LeanError(f"{type(module).__name__} does not say its head size: name the field in head_dim_of.")


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if path else prefix


def _writer(layer: Module, path: str, name: str) -> Projection:
    """The linear at ``name``, or the one inside a part that stands around it (and says so by ``wraps``)."""
    module = layer.get_submodule(name)
    inner = getattr(module, "wraps", None)
    if isinstance(inner, str):
        module, name = getattr(module, inner), f"{name}.{inner}"
    return Projection(_join(path, name), module)


def _attention_modules(where: AttentionPaths) -> Iterable[str | None]:
    return where.module, where.query, where.key, where.value, where.fused, where.output


def _feed_forward_modules(where: FeedForwardPaths) -> Iterable[str | None]:
    return where.up, where.gate, where.fused, where.down


def _standing(layer: Module, alternatives: Any, modules: Any, what: str, family: Family) -> Any:
    """The first of the alternatives whose modules all exist in the layer."""
    for where in alternatives:
        if all(has(layer, name) for name in modules(where) if name):
            return where
    raise LeanError(
        f"The {what} is not where the entry {family.name!r} expects it: "
        "add an alternative to its entry in leanformers/anatomy/families."
    )


def _attention(
    base: Module, layer: Module, path: str, where: AttentionPaths, *, causal: bool, cross: bool
) -> Attention:
    module = layer.get_submodule(where.module)
    head_dim = head_dim_of(module)
    output = _writer(layer, path, where.output)
    if where.fused is None:
        query, key, value = (
            Projection(_join(path, name), layer.get_submodule(name))
            for name in (where.query, where.key, where.value)
            if name
        )
    else:
        fused = layer.get_submodule(where.fused)
        rows = torch.arange(linear_shape(fused)[0])
        if where.layout == "per_head":
            by_head = rows.view(-1, 3, head_dim)  # [heads, query/key/value, head_dim]
            parts = [by_head[:, part].reshape(-1) for part in range(3)]
        else:
            query_size = output.in_features
            key_size = (len(rows) - query_size) // 2
            parts = list(rows.split([query_size, key_size, key_size]))
        query, key, value = (Projection(_join(path, where.fused), fused, part) for part in parts)
    extra = tuple(Projection(_join(path, name), layer.get_submodule(name)) for name in where.extra if has(layer, name))
    positions, terms = 0, 0
    absent = query.out_features == 0
    if where.positions and has(base, where.positions) and not absent:
        positions = base.get_submodule(where.positions).weight.shape[0]
        terms = len(set(getattr(base.config, where.position_terms or "", None) or ()))
    return Attention(
        path=_join(path, where.module),
        module=module,
        query=query,
        key=key,
        value=value,
        output=output,
        extra=extra,
        head_dim=head_dim,
        causal=bool(getattr(module, "is_causal", causal)) and not cross,
        cross=cross,
        query_norm=None if absent or not where.query_norm else layer.get_submodule(where.query_norm),
        key_norm=None if absent or not where.key_norm else layer.get_submodule(where.key_norm),
        positions=positions,
        position_terms=terms,
    )


def _feed_forward(base: Module, layer: Module, path: str, stack: StackPaths, family: Family) -> FeedForward:
    where = _standing(layer, stack.feed_forward, _feed_forward_modules, f"feed-forward of {path}", family)
    gate: Projection | None = None
    if where.fused:
        fused = layer.get_submodule(where.fused)
        rows = torch.arange(linear_shape(fused)[0])
        gate, up = (Projection(_join(path, where.fused), fused, part) for part in rows.chunk(2))
    else:
        up = Projection(_join(path, where.up), layer.get_submodule(where.up))
        if where.gate:
            gate = Projection(_join(path, where.gate), layer.get_submodule(where.gate))
    activation = where.activation or getattr(base.config, family.activation)
    return FeedForward(
        path=_join(path, where.module),
        gate=gate,
        up=up,
        down=_writer(layer, path, where.down),
        activation=activation if isinstance(activation, str) else type(activation).__name__,
    )
