"""Drop sub-layers: whole residual branches of a layer, attention or feed-forward, so that the stream passes by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from leanformers.anatomy import Anatomy, Attention, Layer, Projection, count_parameters, linear_flops
from leanformers.errors import LeanError
from leanformers.parts.absent import AbsentAttention, AbsentLinear
from leanformers.surgery.edit import Cost, Edit, edit, replace
from leanformers.surgery.edits.drop_layers import keep_position_bias


@edit("drop_sublayers")
@dataclass(frozen=True, kw_only=True)
class DropSublayers(Edit):
    """Drop ``sublayers`` of the layer at ``path``: ``attention``, ``cross_attention``, ``feed_forward``.

    Norms that serve a branch alone go with it: before it, or on its output. A norm on the stream (post-norm) stays
    and is applied as before. At least one sub-layer of a model stays.
    """

    path: str
    sublayers: tuple[str, ...]

    def _layer(self, anatomy: Anatomy) -> Layer:
        anatomy.residual.check_droppable()
        layer = next((layer for layer in anatomy.layers if layer.path == self.path), None)
        if layer is None:
            raise LeanError(f"No layer at {self.path!r}: the first one is at {anatomy.layers[0].path!r}.")
        there = layer.sublayers()
        for name in self.sublayers:
            if name not in there:
                raise LeanError(f"{self.path} has no {name!r} to drop: it has {', '.join(there) or 'nothing left'}.")
        reducer = layer.reducer
        if reducer is not None and ("attention" in self.sublayers or reducer.before_feed_forward):
            raise LeanError(f"Tokens are dropped within {self.path}: drop its sub-layers before reduce_tokens.")
        if not self.sublayers or len(set(self.sublayers)) < len(self.sublayers):
            raise LeanError(f"sublayers={list(self.sublayers)} for {self.path}: name each of {', '.join(there)} once.")
        if sum(len(other.sublayers()) for other in anatomy.layers) == len(self.sublayers):
            raise LeanError(f"{self.path} holds the last sub-layer of the model: leave one in place.")
        return layer

    def apply(self, anatomy: Anatomy, **tensors: object) -> None:
        layer = self._layer(anatomy)
        there = layer.sublayers()
        for name in self.sublayers:
            part = there[name]
            if isinstance(part, Attention):
                _pass_attention(anatomy, layer, part)
            else:
                _pass_linears(anatomy, (p for p in (part.gate, part.up) if p is not None), part.down)
            for norm in layer.norms:
                if norm.reads == name and norm.place != "post":
                    replace(anatomy, norm.path, nn.Identity())

    def cost(self, anatomy: Anatomy) -> Cost:
        layer = self._layer(anatomy)
        there = layer.sublayers()
        gone: list[nn.Module] = []
        total = Cost()
        for name in self.sublayers:
            part = there[name]
            gone += [norm.module for norm in layer.norms if norm.reads == name and norm.place != "post"]
            paths = {projection.path for _, projection in part.projections()}
            if isinstance(part, Attention):
                gone += [part.module, part.output.module]
                paths |= {projection.path for projection in part.extra}
                width = part.num_attention_heads * part.head_dim
                total += Cost(per_pair=-4 * width, per_token=-2 * part.position_terms * part.positions * width)
                if _heirs(anatomy, layer, part):
                    total += Cost(parameters=count_parameters(part.module.relative_attention_bias))
            else:
                gone += [projection.module for _, projection in part.projections()]
            for path in paths:
                flops, rows = linear_flops(anatomy.module(path)), anatomy.rows(path)
                total += Cost(per_token=-flops * rows.per_token, per_sequence=-flops * rows.per_sequence)
        return total + Cost(parameters=-count_parameters(nn.ModuleList(gone)))


def _heirs(anatomy: Anatomy, layer: Layer, attention: Attention) -> list[Layer]:
    """The other layers of the stack that could take over the position bias of all, if this attention holds it."""
    if attention.cross or not getattr(attention.module, "has_relative_attention_bias", False):
        return []
    return [other for other in anatomy.stacks[layer.stack] if other is not layer and not other.attention.absent]


def _pass_attention(anatomy: Anatomy, layer: Layer, old: Attention) -> None:
    if heirs := _heirs(anatomy, layer, old):
        keep_position_bias(anatomy.stacks[layer.stack], heirs)
    replace(anatomy, old.path, AbsentAttention.like(old))
    _pass_linears(anatomy, (old.query, old.key, old.value), old.output)


def _pass_linears(anatomy: Anatomy, reading: Iterable[Projection], writing: Projection) -> None:
    """Their places stay, so that the anatomy finds them."""
    width = writing.out_features
    for path in {projection.path for projection in reading}:
        replace(anatomy, path, AbsentLinear(width, writes=False))
    replace(anatomy, writing.path, AbsentLinear(width, writes=True))
