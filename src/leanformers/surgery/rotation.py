"""Turning a pre-norm model's residual stream into other bases, one per position, and slicing it (card slicegpt).

The model is walked in the order of computation. Where the stream starts, and after each sub-layer, the next rotation
is drawn; all before that place is turned and sliced by then, so whoever chooses the rotations can look at the signal
as the sliced model makes it. Each weight is folded, turned and rounded once, in float64, and no other copy is made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leanformers.anatomy import Anatomy, Attention, FeedForward, Layer, Norm, Projection, is_conv1d, is_dense
from leanformers.errors import LeanError
from leanformers.parts.masked import MaskedLinear
from leanformers.parts.rotated import Carrier, RotatedNorm, ShortcutLinear
from leanformers.surgery.config import set_field
from leanformers.surgery.edit import Cost, on_meta, replace
from leanformers.surgery.stream import Stream, put
from leanformers.surgery.tying import tied_names, untie

Sublayer = Attention | FeedForward
_ROWS = 8192  # of a table or a head at a time in float64


def steps(anatomy: Anatomy) -> Iterator[tuple[Layer, list[tuple[Norm, Sublayer]]]]:
    """The places where the stream is added to: a layer and its sub-layers, with their norms, that are added there
    together (one, or both of a parallel block)."""
    for layer in anatomy.layers:
        pairs = [(norm, part) for name, part in layer.sublayers().items() if (norm := layer.norm("pre", name))]
        yield from ((layer, group) for group in ([pairs] if layer.parallel else [[pair] for pair in pairs]) if group)


def writer(part: Sublayer) -> Projection:
    """The linear of a sub-layer that writes to the stream."""
    return part.output if isinstance(part, Attention) else part.down


def centred(signal: Tensor, norm: Norm) -> Tensor:
    """The part of a signal [..., hidden_size] that a norm does not take away: all for RMSNorm, less its mean else."""
    return signal - signal.mean(-1, keepdim=True) if isinstance(norm.module, nn.LayerNorm) else signal


def refuse(anatomy: Anatomy) -> None:
    """Raises:
    LeanError: the stream cannot be rotated, with the reason.
    """
    name = type(anatomy.model).__name__
    reason = _reason(anatomy)
    if reason is not None:
        raise LeanError(f"The residual stream of {name} cannot be rotated: {reason}.")


def _reason(anatomy: Anatomy) -> str | None:
    if anatomy.residual.rotated:
        return "it already is; slice once, to the size that is wanted"
    if len(anatomy.family.stacks) > 1:
        return f"{anatomy.family.name} has an encoder and a decoder, whose streams start or meet in ways of their own"
    for norm in anatomy.norms:
        if norm.place in ("output", "scale"):
            return f"{norm.path} rescales single dimensions of what a sub-layer adds"
        if norm.place in ("post", "embedding"):
            return f"{norm.path} norms the stream itself; only pre-norm models leave it to its readers"
        if _eps(norm.module) is None or not (isinstance(norm.module, nn.LayerNorm) or anatomy.family.rms_norm):
            return f"{norm.path} is a {type(norm.module).__name__}, which is neither a LayerNorm nor an RMSNorm"
    for layer in anatomy.layers:
        if bare := [name for name in layer.sublayers() if layer.norm("pre", name) is None]:
            return f"no norm stands before the {bare[0]} of {layer.path}"
    if len(anatomy.final_norms) != 1:
        return "it has no norm after its last layer"
    if anatomy.is_text and anatomy.residual.inputs:
        return f"{next(iter(anatomy.residual.inputs))} stands between the embeddings and the stream"
    for one in [*anatomy.residual.reads, *anatomy.residual.writes, *anatomy.residual.outputs.values()]:
        if not is_dense(one.module) or isinstance(one.module, MaskedLinear):
            return f"{one.path} is a {type(one.module).__name__}; rotate before other edits on linears"
    if not anatomy.residual.outputs and not on_meta(anatomy.layers[0].module):
        return "it has no head that reads the stream, so its last norm has nowhere to leave its gain; load it with one"
    return None


@torch.no_grad()
def rotate(anatomy: Anatomy, size: int, rotations: Iterable[Tensor] | None) -> None:
    """Rotate and slice in place.

    Args:
        anatomy: of a model that ``refuse`` lets pass, or of its skeleton.
        size: dimensions that stay at every position.
        rotations: [hidden_size, size] each, with orthonormal columns: one for the start, one per item of ``steps``.
            They are drawn when all before their position is in place. None on a skeleton.

    Raises:
        LeanError: too few rotations, or another shape; what was turned before stays turned.
    """
    stream, width = Stream.of(anatomy, size), anatomy.hidden_size
    drawn = iter(rotations) if rotations is not None else itertools.repeat(torch.empty(width, size, device="meta"))
    final, heads = anatomy.final_norms[0], list(anatomy.residual.outputs.values())
    _untie(anatomy)
    basis = _next(drawn, width, size)
    for module in stream.convolutions.values():
        for name, parameter in list(module.named_parameters(recurse=False)):
            data = centred(parameter.data.double().movedim(0, -1), final) @ basis.to(parameter.device)
            setattr(module, name, _like(parameter, data.movedim(-1, 0)))
        module.out_channels = size
    tables = {
        id(table): _like(table, _by_rows(table.data, lambda rows: centred(rows, final) @ basis.to(rows.device)))
        for table in stream.tables.values()
    }
    put(anatomy.model, tables)
    for layer, group in list(steps(anatomy)):
        for norm, _ in group:
            part = _leave_gain(anatomy, norm, anatomy.residual.readers(norm), basis)
        out = _next(drawn, width, size)
        for norm, sublayer in group:
            _turn_writer(writer(sublayer).module, out, norm)
        end = writer(group[-1][1])
        part.carrier = Carrier()
        wrapped = ShortcutLinear(end.module, size, part.carrier)
        if not on_meta(wrapped):
            change = basis.t().to(out.device) @ out - torch.eye(size, dtype=out.dtype, device=out.device)
            wrapped.shortcut.weight.copy_(change.t())
        replace(anatomy, end.path, wrapped)
        _silence(layer.module)
        basis = out
    _leave_gain(anatomy, final, heads, basis)
    stream.rename()


def cost(anatomy: Anatomy, size: int) -> Cost:
    """What ``rotate`` changes: no gains, a head of its own, a shortcut per position, and all that is narrower."""
    stream = Stream.of(anatomy, size)
    parameters = -size * sum(1 for norm in stream.norms for _ in norm.parameters(recurse=False))
    places = list(steps(anatomy))
    served = [(norm, anatomy.residual.readers(norm)) for _, group in places for norm, _ in group]
    served.append((anatomy.final_norms[0], list(anatomy.residual.outputs.values())))
    for norm, readers in served:
        if getattr(norm.module, "bias", None) is not None:
            parameters += sum(len(m.weight) for m in _modules(readers) if m.bias is None)
    if anatomy.tied:
        parameters += size * len(anatomy.embeddings.weight)  # type: ignore[union-attr,arg-type]
    shortcuts = len(places) * size * size
    return stream.cost() + Cost(parameters=parameters + shortcuts, per_token=2 * shortcuts)


def _next(drawn: Iterator[Tensor], width: int, size: int) -> Tensor:
    basis = next(drawn, None)
    if basis is None or basis.shape != (width, size):
        found = "there are no more" if basis is None else f"one is {list(basis.shape)}"
        raise LeanError(f"Rotations are [{width}, {size}], one for the start and one per sub-layer, but {found}.")
    return basis.detach().double()


def _eps(norm: nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _modules(readers: Sequence[Projection]) -> list[Any]:
    return list({id(one.module): one.module for one in readers}.values())


def _leave_gain(anatomy: Anatomy, norm: Norm, readers: Sequence[Projection], basis: Tensor) -> RotatedNorm:
    """Put a norm without gain in place; gain, bias and the basis go into the linears that read it."""
    gain, shift = anatomy.residual.gain(norm).detach().double(), getattr(norm.module, "bias", None)
    for module in _modules(readers):
        weight = _matrix(module)  # [out, hidden_size]
        if shift is not None:
            bias = weight.double() @ shift.detach().double().to(weight.device)
            if module.bias is None:
                module.bias = _like(module.weight, bias)
            else:
                module.bias = _like(module.bias, module.bias.data.double() + bias)
        _set_matrix(module, _by_rows(weight, lambda rows: rows * gain.to(rows.device) @ basis.to(rows.device)))
    eps = _eps(norm.module)
    assert eps is not None
    part = RotatedNorm.like(norm.module, len(basis), eps)
    replace(anatomy, norm.path, part)
    return part


def _turn_writer(module: Any, basis: Tensor, norm: Norm) -> None:
    weight = _matrix(module).double()  # [hidden_size, in]
    _set_matrix(module, (centred(weight.t(), norm) @ basis.to(weight.device)).t())
    if module.bias is not None:
        module.bias = _like(module.bias, centred(module.bias.data.double(), norm) @ basis.to(weight.device))


def _matrix(module: Any) -> Tensor:
    weight: Tensor = module.weight.data
    return weight.t() if is_conv1d(module) else weight


def _by_rows(weight: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """``turn`` of the rows in float64, some at a time: a whole table or head so might be larger than all the layers."""
    return torch.cat([turn(rows.double()).to(weight.dtype) for rows in weight.split(_ROWS)])


def _set_matrix(module: Any, weight: Tensor) -> None:
    out_features, in_features = weight.shape
    transposed = is_conv1d(module)
    module.weight = _like(module.weight, weight.t() if transposed else weight)
    names = ("nf", "nx") if transposed else ("out_features", "in_features")
    for name, value in zip(names, (out_features, in_features), strict=True):
        setattr(module, name, value)


def _like(old: Tensor, data: Tensor) -> nn.Parameter:
    return nn.Parameter(data.to(old.dtype).contiguous(), requires_grad=old.requires_grad)


def _untie(anatomy: Anatomy) -> None:
    """Give a tied head a weight of its own: the two ends of the stream are in different bases."""
    model, table, head = anatomy.model, anatomy.embeddings, anatomy.head
    if table is None or head is None:
        return
    names = {id(module): name for name, module in model.named_modules()}
    if f"{names[id(head)]}.weight" not in tied_names(model):
        return
    untie(model, names[id(table)])
    weight: Any = head.weight
    head.weight = nn.Parameter(weight.data, requires_grad=weight.requires_grad)  # turned, not changed in place
    for config in {id(config): config for config in (model.config, anatomy.config)}.values():
        set_field(model, config, "tie_word_embeddings", False)


def _silence(layer: nn.Module) -> None:
    """No dropout on what a sub-layer adds: it would fall on the shortcut, which the stream itself passes through."""
    for name, module in layer.named_modules():
        if isinstance(module, nn.Dropout) and not name.rpartition(".")[2].startswith(("attn_drop", "attention_drop")):
            module.p = 0.0
    if isinstance(getattr(layer, "dropout", None), float):
        layer.dropout = 0.0  # type: ignore[assignment]
