"""Factorise a linear: W [out, in] becomes up [out, rank] after down [rank, in], or few atoms of a dictionary a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from leanformers.anatomy import Anatomy, linear_shape
from leanformers.errors import LeanError
from leanformers.parts.absent import AbsentLinear
from leanformers.parts.dense_sparse import DenseSparseLinear, check_sizes
from leanformers.parts.dictionary import Factors
from leanformers.parts.linear import LowRankLinear
from leanformers.parts.masked import MaskedLinear
from leanformers.parts.quantised import QuantisedLinear
from leanformers.surgery.edit import Cost, Edit, edit, on_meta, replace


@edit("factorise_linear", version=2)
@dataclass(frozen=True, kw_only=True)
class FactoriseLinear(Edit):
    """Replace the linear at ``path`` by factors of the given rank.

    Kind ``low_rank``: two linears, the bias on the second. ``apply`` takes ``up`` [out, rank] and ``down`` [rank, in];
    without them the factors are the truncated SVD's, its spectrum shared evenly.
    Kind ``dense_sparse``: for every block of ``width`` inputs a dictionary of ``rank`` atoms, and ``nonzeros`` of them
    a row (DenseSparseLinear says what ``mode`` is). ``apply`` takes ``dictionary``, ``values``, ``indices``; without
    them alternating pursuit finds some.
    """

    path: str
    rank: int
    kind: str = "low_rank"
    width: int = 0
    nonzeros: int = 0
    mode: str = "materialised"

    def to_json(self) -> dict[str, Any]:
        if self.kind == "low_rank":  # as version 1 wrote it
            return {"type": self.type, "version": 1, "path": self.path, "rank": self.rank}
        return super().to_json()

    def _old(self, anatomy: Anatomy) -> torch.nn.Module:
        old = anatomy.module(self.path)
        if isinstance(old, (LowRankLinear, DenseSparseLinear, MaskedLinear, QuantisedLinear, AbsentLinear)):
            what = {MaskedLinear: "masked", QuantisedLinear: "quantised", AbsentLinear: "dropped"}.get(
                type(old), "factorised"
            )
            raise LeanError(f"{self.path} is already {what}: factorise before that, or leave it out.")
        out_features, in_features = linear_shape(old)
        if self.kind == "dense_sparse":
            if (reason := check_sizes(out_features, in_features, self.rank, self.width, self.nonzeros)) is not None:
                raise LeanError(f"{self.path}, a {out_features} x {in_features} linear: {reason}.")
            return old
        if self.kind != "low_rank":
            raise LeanError(f"{self.path}: there is no factorisation {self.kind!r}; take low_rank or dense_sparse.")
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
        dictionary: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        indices: torch.Tensor | None = None,
        **tensors: object,
    ) -> None:
        old = self._old(anatomy)
        if self.kind == "dense_sparse":
            sparse = DenseSparseLinear.like(old, self.rank, self.width, self.nonzeros, self.mode)
            if not on_meta(old):
                given = dictionary is not None and values is not None and indices is not None
                sparse.carry(old, Factors(dictionary, values, indices) if given else None)  # type: ignore[arg-type]
            replace(anatomy, self.path, sparse)
            return
        new = LowRankLinear.like(old, self.rank)
        if not on_meta(old):
            new.carry(old, up, down)
        replace(anatomy, self.path, new)

    def cost(self, anatomy: Anatomy) -> Cost:
        out_features, in_features = linear_shape(self._old(anatomy))
        rows = anatomy.rows(self.path)
        if self.kind == "dense_sparse":
            sparse = self.rank * in_features + self.nonzeros * (in_features // self.width) * out_features
            parameters = sparse - out_features * in_features
            change = parameters if self.mode == "factored" else 0
        else:
            parameters = change = self.rank * (out_features + in_features) - out_features * in_features
        return Cost(
            parameters=parameters,
            per_token=2 * change * rows.per_token,
            per_sequence=2 * change * rows.per_sequence,
        )
