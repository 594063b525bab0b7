"""Factorise a linear: W [out, in] becomes up [out, rank] after down [rank, in]."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from leanformers.anatomy import Anatomy, linear_shape
from leanformers.errors import LeanError
from leanformers.parts.linear import LowRankLinear
from leanformers.parts.masked import MaskedLinear
from leanformers.parts.quantised import QuantisedLinear
from leanformers.surgery.edit import Cost, Edit, edit, on_meta, replace


@edit("factorise_linear")
@dataclass(frozen=True, kw_only=True)
class FactoriseLinear(Edit):
    """Replace the linear at ``path`` by two of the given rank; the bias stays on the second.

    ``apply`` takes ``up`` [out, rank] and ``down`` [rank, in]; without them the factors are the truncated
    SVD's, its spectrum shared evenly.
    """

    path: str
    rank: int

    def _old(self, anatomy: Anatomy) -> torch.nn.Module:
        old = anatomy.module(self.path)
        if isinstance(old, (LowRankLinear, MaskedLinear, QuantisedLinear)):
            what = {LowRankLinear: "factorised", MaskedLinear: "masked", QuantisedLinear: "quantised"}[type(old)]
            raise LeanError(f"{self.path} is already {what}: factorise before that, or leave it out.")
        out_features, in_features = linear_shape(old)
        if not 0 < self.rank <= min(out_features, in_features):
            raise LeanError(
                f"rank {self.rank} does not fit {self.path}, a {out_features} x {in_features} linear: "
                f"take 1 to {min(out_features, in_features)}."
            )
        return old

    def apply(
        self,
        anatomy: Anatomy,
        up: torch.Tensor | None = None,
        down: torch.Tensor | None = None,
        **tensors: object,
    ) -> None:
        old = self._old(anatomy)
        new = LowRankLinear.like(old, self.rank)
        if not on_meta(old):
            new.carry(old, up, down)
        replace(anatomy, self.path, new)

    def cost(self, anatomy: Anatomy) -> Cost:
        out_features, in_features = linear_shape(self._old(anatomy))
        change = self.rank * (out_features + in_features) - out_features * in_features
        rows = anatomy.rows(self.path)
        return Cost(
            parameters=change,
            per_token=2 * change * rows.per_token,
            per_sequence=2 * change * rows.per_sequence,
        )
