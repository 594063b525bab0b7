"""Quantise a linear to int8, by torchao."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from leanformers.anatomy import Anatomy, is_dense
from leanformers.errors import LeanError
from leanformers.parts.quantised import QuantisedLinear, check_scheme
from leanformers.surgery.edit import Cost, Edit, edit, on_meta, replace


@edit("quantise_linear")
@dataclass(frozen=True, kw_only=True)
class QuantiseLinear(Edit):
    """Quantise the linear at ``path``: ``int8_weight_only`` or ``int8_dynamic`` (activations too).

    The number of parameters stays; each takes one byte instead of two or four.
    """

    path: str
    scheme: str = "int8_weight_only"

    def _old(self, anatomy: Anatomy) -> nn.Module:
        old = anatomy.module(self.path)
        if not is_dense(old):
            raise LeanError(
                f"{self.path} is a {type(old).__name__}, which cannot be quantised: quantise plain linears, "
                "such as the two inner ones of a factorised linear."
            )
        check_scheme(self.scheme)
        return old

    def apply(self, anatomy: Anatomy, **tensors: object) -> None:
        old = self._old(anatomy)
        new = QuantisedLinear.like(old, self.scheme)
        if not on_meta(old):
            new.carry(old)
        replace(anatomy, self.path, new)

    def cost(self, anatomy: Anatomy) -> Cost:
        self._old(anatomy)
        return Cost()
