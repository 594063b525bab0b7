"""Mask weights: single weights become zero and stay zero through training, saving and loading."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from leanformers.anatomy import Anatomy, is_dense, linear_shape
from leanformers.errors import LeanError
from leanformers.parts.masked import MaskedLinear, parse_pattern
from leanformers.surgery.edit import Cost, Edit, edit, on_meta, replace


@edit("mask_weights")
@dataclass(frozen=True, kw_only=True)
class MaskWeights(Edit):
    """Mask the linear at ``path``. ``pattern`` is ``unstructured`` or ``N:M`` (N kept of every M inputs).

    ``apply`` takes ``mask`` (bool, [out, in]): true where a weight stays. Zeros save neither bytes nor time
    until a format or a kernel uses them, so the cost is nil.
    """

    path: str
    pattern: str = "unstructured"

    def _old(self, anatomy: Anatomy) -> nn.Module:
        old = anatomy.module(self.path)
        if not is_dense(old):
            raise LeanError(
                f"{self.path} is a {type(old).__name__}, whose weights cannot be masked: mask plain linears, "
                "such as the two inner ones of a factorised linear."
            )
        parse_pattern(self.pattern, linear_shape(old)[1])
        return old

    def apply(self, anatomy: Anatomy, mask: torch.Tensor | None = None, **tensors: object) -> None:
        old = self._old(anatomy)
        new = MaskedLinear.like(old, self.pattern)
        if not on_meta(old):
            if mask is None:
                raise LeanError(f"Which weights of {self.path} stay is not said: pass mask=, a bool tensor [out, in].")
            new.carry(old, mask)
        replace(anatomy, self.path, new)

    def cost(self, anatomy: Anatomy) -> Cost:
        self._old(anatomy)
        return Cost()
