"""Slice the residual stream: every part that writes or reads it gets a smaller width."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.surgery import rotation
from leanformers.surgery.edit import Cost, Edit, edit, kept, on_meta
from leanformers.surgery.stream import Stream


@edit("slice_residual")
@dataclass(frozen=True, kw_only=True)
class SliceResidual(Edit):
    """Keep ``size`` dimensions of the residual stream, in every stack of the model.

    As it is, the same dimensions stay everywhere: ``apply`` takes ``keep`` (int64, [size], ascending). Norms go on over
    those alone, heads keep their size, a tied head stays tied.

    ``rotated`` first turns the stream into another basis at each of its positions, in pre-norm models: ``apply`` takes
    ``rotations`` ([hidden_size, size] each; ``rotation.rotate`` says how many and when they are drawn). Norms then have
    no gain and divide by the width before the slice, each sub-layer's last linear carries a shortcut from basis to
    basis, a tied head becomes one of its own, and dropout on what sub-layers add is off. Layers cannot be dropped
    afterwards. The head reads the sliced stream (the paper widens it again before the head).
    """

    size: int
    rotated: bool = False

    def apply(
        self,
        anatomy: Anatomy,
        keep: torch.Tensor | None = None,
        rotations: Iterable[torch.Tensor] | None = None,
        **tensors: object,
    ) -> None:
        skeleton = on_meta(anatomy.base)
        if self.rotated:
            if rotations is None and not skeleton:
                raise LeanError("A rotated slice needs rotations=, one [hidden_size, size] tensor per position.")
            rotation.rotate(anatomy, self.size, rotations)
        else:
            index = kept(keep, self.size, anatomy.hidden_size, _WHAT, on_skeleton=skeleton)
            Stream.of(anatomy, self.size).keep(index)

    def cost(self, anatomy: Anatomy) -> Cost:
        kept(None, self.size, anatomy.hidden_size, _WHAT, on_skeleton=True)
        if self.rotated:
            rotation.refuse(anatomy)
            return rotation.cost(anatomy, self.size)
        if anatomy.residual.rotated:
            raise LeanError(f"The residual stream of {type(anatomy.model).__name__} is rotated: slice it only once.")
        return Stream.of(anatomy, self.size).cost()


_WHAT = "dimensions of the residual stream"
