"""Greenformers: the Low-Rank Transformer, every linear of the layers as the product of two thin ones.

Source: Cahyawijaya (2021, arXiv 2108.10808); toolkit paper arXiv 2109.06762; LRT first in Winata et al. (ICASSP 2020).
A linear W (out, in) becomes ``up`` (out, r) after ``down`` (r, in), the bias on ``up``. ``rank`` below 1 is a share of
the break-even rank in*out/(in+out), from 1 on an absolute rank; a linear whose rank would save nothing is left alone.
Embeddings, head and classifier stay dense. Fused projections are factorised whole: query, key and value share
``down``. Deviations: the SVD is exact instead of randomised, its spectrum shared evenly between the factors
(``balance``) since training follows; ranks are rounded to multiples of 8, which matrix kernels like; semi-NMF runs
200 iterations, 10 being too few. Left out: Linformer (part B of the thesis), which is an attention mixer, and
convolutions.
Cost: r (in + out) parameters and twice that many FLOPs per token instead of in * out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from leanformers.anatomy import Anatomy, is_conv1d, linear_shape
from leanformers.errors import LeanError
from leanformers.methods.base import Choice, Range, Saving, Subject, method, setting
from leanformers.surgery import FactoriseLinear

Factors = tuple[torch.Tensor, torch.Tensor]


@method("greenformers", stock=False, stage="structure", order=20, paper="Cahyawijaya (2021)")
@dataclass(frozen=True, kw_only=True)
class Greenformers:
    """Factorise the linears of the layers."""

    rank: float = setting(0.5, low=0.01, help="below 1: share of the break-even rank; from 1 on: the rank itself")
    solver: Literal["svd", "snmf", "nmf", "random"] = setting("svd", help="random is for training from scratch")
    roles: tuple[str, ...] = setting(
        ("query", "key", "value", "output", "gate", "up", "down"), help="which linears are factorised"
    )
    balance: bool = setting(True, help="share the spectrum evenly between the factors (svd)")
    num_iter: int = setting(200, low=1, help="iterations of the nmf solvers")
    clip: bool = setting(False, help="let nmf clip negative weights to zero first")
    multiple: int = setting(8, low=1, help="ranks are rounded down to a multiple of this")

    def __call__(self, subject: Subject) -> None:
        ranks = self._ranks(subject.anatomy)
        if not ranks:
            raise LeanError("method 'greenformers': no linear would get smaller at this rank; lower it.")
        for path, rank in ranks.items():
            module = subject.anatomy.module(path)
            weight = module.weight.t() if is_conv1d(module) else module.weight
            up, down = self._solve(weight.detach().float(), rank, path, subject.seed)
            subject.apply(FactoriseLinear(path=path, rank=rank), up=up, down=down)
        subject.notes["factorised"] = len(ranks)

    def _ranks(self, anatomy: Anatomy) -> dict[str, int]:
        ranks = {}
        for path in anatomy.paths(self.roles):
            module = anatomy.module(path)
            if not _plain(module):
                continue
            out_features, in_features = linear_shape(module)
            rank = rank_of(self.rank, out_features, in_features, self.multiple)
            if rank:
                ranks[path] = rank
        return ranks

    def _solve(self, weight: torch.Tensor, rank: int, path: str, seed: int) -> Factors:
        if self.solver == "svd":
            return svd(weight, rank, balance=self.balance)
        if self.solver == "snmf":
            return semi_nmf(weight, rank, self.num_iter)
        if self.solver == "nmf":
            if (weight < 0).any() and not self.clip:
                raise LeanError(
                    f"method 'greenformers': {path} has negative weights, which nmf cannot fit: "
                    "take snmf or svd, or set clip."
                )
            return nmf(weight.clamp_min(0), rank, self.num_iter)
        generator = torch.Generator().manual_seed(seed + sum(path.encode()))
        return random(weight, rank, generator)

    def refuses(self, anatomy: Anatomy, task: Any) -> str | None:
        if not any(_plain(anatomy.module(path)) for path in anatomy.paths(self.roles)):
            return "it has no plain linears of these roles; factorise before other edits on them"
        return None if self._ranks(anatomy) else "no linear would get smaller at this rank; lower it"

    def estimate(self, anatomy: Anatomy, length: int = 128) -> Saving:
        parameters = flops = 0
        for path, rank in self._ranks(anatomy).items():
            cost = FactoriseLinear(path=path, rank=rank).cost(anatomy)
            parameters, flops = parameters + cost.parameters, flops + cost.flops(length)
        return Saving(parameters=parameters, flops=flops)

    @classmethod
    def space(cls) -> dict[str, Choice | Range]:
        return {"rank": Choice((0.4, 0.6, 0.8))}

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return [{"rank": 0.6}]


def _plain(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Linear or is_conv1d(module)


def rank_of(rank: float, out_features: int, in_features: int, multiple: int = 1) -> int:
    """The rank that a setting means for one linear, 0 where it would save nothing.

    Below 1 it is a share of floor(in*out / (in+out)), at which both forms hold as many weights.
    """
    most = in_features * out_features // (in_features + out_features)
    wanted = int(rank * most) if rank < 1 else int(rank)
    rounded = max(wanted // multiple * multiple, min(wanted, multiple))
    return rounded if 0 < rounded < most else 0


def svd(weight: torch.Tensor, rank: int, *, balance: bool = True) -> Factors:
    """(up [out, rank], down [rank, in]) nearest to ``weight`` [out, in] in the Frobenius norm."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    if balance:
        root = s[:rank].sqrt()
        return u[:, :rank] * root, root[:, None] * vh[:rank]
    return u[:, :rank], s[:rank, None] * vh[:rank]


def semi_nmf(weight: torch.Tensor, rank: int, iterations: int) -> Factors:
    """Semi-NMF (Ding, Li, Jordan 2010): up [out, rank] is non-negative, down [rank, in] of any sign.

    Starts at the absolute right singular vectors plus 0.01, so it is deterministic; the error never rises.
    """
    a = weight.t().double()  # [in, out], the card's A ~ F G^T
    g = torch.linalg.svd(a, full_matrices=False)[2][:rank].t().abs() + 1e-2  # [out, rank]
    for _ in range(iterations):
        f = a @ g @ torch.linalg.pinv(g.t() @ g)  # [in, rank]
        cross, gram = a.t() @ f, f.t() @ f
        above = cross.clamp_min(0) + g @ gram.clamp_max(0).neg()
        below = cross.clamp_max(0).neg() + g @ gram.clamp_min(0)
        g = g * (above / (below + 1e-9)).sqrt()
    f = a @ g @ torch.linalg.pinv(g.t() @ g)
    return g.to(weight.dtype), f.t().to(weight.dtype)


def nmf(weight: torch.Tensor, rank: int, iterations: int) -> Factors:
    """Non-negative factors by multiplicative updates (Lee and Seung 2001); ``weight`` must be non-negative."""
    a = weight.double()
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    root = s[:rank].sqrt()
    up, down = (u[:, :rank] * root).abs() + 1e-2, (root[:, None] * vh[:rank]).abs() + 1e-2
    for _ in range(iterations):
        down = down * (up.t() @ a) / (up.t() @ up @ down + 1e-9)
        up = up * (a @ down.t()) / (up @ (down @ down.t()) + 1e-9)
    return up.to(weight.dtype), down.to(weight.dtype)


def random(weight: torch.Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Fresh factors with nn.Linear's own initialisation: for training from scratch."""
    out_features, in_features = weight.shape

    def fresh(rows: int, columns: int) -> torch.Tensor:
        return (torch.rand(rows, columns, generator=generator) * 2 - 1).to(weight) / math.sqrt(columns)

    return fresh(out_features, rank), fresh(rank, in_features)
