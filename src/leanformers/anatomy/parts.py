"""The vocabulary of the map: linears, projections, attention, feed-forward, norm, layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from leanformers.errors import LeanError

Module: TypeAlias = Any  # an nn.Module, read by attributes that its type does not declare


def is_conv1d(module: Module) -> bool:
    """Whether this is GPT-2's Conv1D, a linear that stores its weight as [in, out]."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: Module) -> bool:
    """Whether this is a linear of any make: Linear, Conv1D, factorised, masked, quantised."""
    return is_conv1d(module) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def is_dense(module: Module) -> bool:
    """Whether this is a linear with one float weight: Linear (masked ones too) or Conv1D."""
    return isinstance(module, torch.nn.Linear) or is_conv1d(module)


def linear_shape(module: Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear of any make.

    Raises:
        LeanError: the module is not a linear.
    """
    if is_conv1d(module):
        in_features, out_features = module.weight.shape
        return int(out_features), int(in_features)
    if is_linear(module):
        return int(module.out_features), int(module.in_features)
    raise LeanError(f"{type(module).__name__} is not a linear: name an nn.Linear or a Conv1D.")


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear part: a whole module, or the rows of a fused one that belong to the part.

    ``rows`` (int64) are the output rows inside the module, None for all of them.
    """

    path: str
    module: Module
    rows: torch.Tensor | None = None

    @property
    def in_features(self) -> int:
        return linear_shape(self.module)[1]

    @property
    def out_features(self) -> int:
        return linear_shape(self.module)[0] if self.rows is None else len(self.rows)

    @property
    def fused(self) -> bool:
        return self.rows is not None

    @property
    def transposed(self) -> bool:
        """Whether the module stores its weight as [in, out]."""
        return is_conv1d(self.module)

    def weight(self) -> torch.Tensor:
        """The weight [out_features, in_features], a view where possible."""
        weight = self.module.weight
        weight = weight.t() if self.transposed else weight
        return weight if self.rows is None else weight[self.rows.to(weight.device)]

    def bias(self) -> torch.Tensor | None:
        """The bias [out_features], or None."""
        bias = getattr(self.module, "bias", None)
        return bias if bias is None or self.rows is None else bias[self.rows.to(bias.device)]


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm, its place and the sub-layer that it serves.

    ``place`` is ``pre``, ``post``, ``output`` or ``scale`` in a layer (``NormPath`` says what each means),
    ``embedding`` before a stack's first layer, ``final`` after its last; ``reads`` is the sub-layer, or the
    stack.
    """

    path: str
    module: Module
    place: str
    reads: str


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention. Queries are ``num_attention_heads * head_dim`` wide, keys and values
    ``num_key_value_heads * head_dim``; with grouped queries several heads share a key/value head.

    ``query_norm`` and ``key_norm`` norm each head [head_dim] after its projection. ``extra`` are further
    projections laid out by head. ``positions`` rows of a table are projected and scored against every query
    or key, ``position_terms`` times (DeBERTa). One that was dropped has no heads, and no projections to list.
    """

    path: str
    module: Module
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    extra: tuple[Projection, ...]
    head_dim: int
    causal: bool
    cross: bool
    query_norm: Module | None = None
    key_norm: Module | None = None
    positions: int = 0
    position_terms: int = 0

    @property
    def num_attention_heads(self) -> int:
        return self.query.out_features // self.head_dim

    @property
    def num_key_value_heads(self) -> int:
        return self.key.out_features // self.head_dim

    @property
    def absent(self) -> bool:
        """Whether it was dropped: the stream passes by."""
        return self.num_attention_heads == 0

    @property
    def mixer(self) -> Module | None:
        """What attends in place of softmax attention, None where nothing does."""
        return getattr(self.module, "mixer", None)

    def projections(self) -> Iterator[tuple[str, Projection]]:
        if not self.absent:
            yield from (("query", self.query), ("key", self.key), ("value", self.value), ("output", self.output))


@dataclass(frozen=True, eq=False)
class FeedForward:
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)); ``activation`` as ACT2FN names it. One that was
    dropped has no neurons, and no projections to list."""

    path: str
    gate: Projection | None
    up: Projection
    down: Projection
    activation: str

    @property
    def intermediate_size(self) -> int:
        return self.up.out_features

    @property
    def absent(self) -> bool:
        """Whether it was dropped: the stream passes by."""
        return self.intermediate_size == 0

    def projections(self) -> Iterator[tuple[str, Projection]]:
        if self.absent:
            return
        if self.gate is not None:
            yield "gate", self.gate
        yield from (("up", self.up), ("down", self.down))


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer; ``index`` counts within its stack. ``parallel``: attention and feed-forward read the same
    residual stream and are added to it together. A sub-layer that was dropped is still named, and ``absent``."""

    path: str
    module: Module
    stack: str
    index: int
    attention: Attention
    cross_attention: Attention | None
    feed_forward: FeedForward
    norms: tuple[Norm, ...]
    parallel: bool = False

    def attentions(self) -> Iterator[Attention]:
        """Those that are there."""
        for attention in (self.attention, self.cross_attention):
            if attention is not None and not attention.absent:
                yield attention

    def sublayers(self) -> dict[str, Attention | FeedForward]:
        """The residual branches that are there, by name, in the order of computation."""
        named = {
            "attention": self.attention,
            "cross_attention": self.cross_attention,
            "feed_forward": self.feed_forward,
        }
        return {name: part for name, part in named.items() if part is not None and not part.absent}

    @property
    def reducer(self) -> Module | None:
        """The attention's mixer if it drops tokens too (``parts.token_reducers``), else None."""
        mixer = self.attention.mixer
        return mixer if getattr(mixer, "reduces_tokens", False) else None

    def norm(self, place: str, reads: str) -> Norm | None:
        """The norm of a sub-layer at a place, None where the layer has none there."""
        return next((norm for norm in self.norms if (norm.place, norm.reads) == (place, reads)), None)
