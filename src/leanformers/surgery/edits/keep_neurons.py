"""Keep neurons: cut a feed-forward down to some of its intermediate units."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from leanformers.anatomy import Anatomy
from leanformers.surgery.edit import Cost, Edit, edit, kept, on_meta
from leanformers.surgery.linears import Cut, column_flops, column_parameters, cut, row_flops, row_parameters


@edit("keep_neurons")
@dataclass(frozen=True, kw_only=True)
class KeepNeurons(Edit):
    """Keep ``size`` intermediate units of the feed-forward at ``path``.

    ``apply`` takes ``keep`` (int64, [size], ascending): which. A gated unit is a row of gate, the same row of
    up and a column of down.
    """

    path: str
    size: int

    def apply(self, anatomy: Anatomy, keep: torch.Tensor | None = None, **tensors: object) -> None:
        part = anatomy.feed_forward(self.path)
        total = part.intermediate_size
        index = kept(keep, self.size, total, f"neurons of {self.path}", on_skeleton=on_meta(part.down.module))
        if part.gate is not None and part.gate.rows is not None and part.up.rows is not None:
            fused = torch.cat([part.gate.rows[index], part.up.rows[index]])
            cuts = [Cut(part.up.path, part.up.module, 0, fused)]
        else:
            cuts = [Cut(p.path, p.module, 0, index) for p in (part.gate, part.up) if p is not None]
        cut([*cuts, Cut(part.down.path, part.down.module, 1, index)])
        for name in ("intermediate_size", "hidden_dim"):
            if isinstance(getattr(anatomy.module(self.path), name, None), int):
                setattr(anatomy.module(self.path), name, self.size)

    def cost(self, anatomy: Anatomy) -> Cost:
        part = anatomy.feed_forward(self.path)
        gone = part.intermediate_size - self.size
        rows = [p.module for p in (part.gate, part.up) if p is not None]
        parameters = sum(row_parameters(m) for m in rows) + column_parameters(part.down.module)
        flops = sum(row_flops(m) for m in rows) + column_flops(part.down.module)
        return Cost(parameters=-gone * parameters, per_token=-gone * flops)
