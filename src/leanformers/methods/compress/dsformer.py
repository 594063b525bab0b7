"""DSFormer: every row of a linear as a few atoms of a shared dictionary, atoms and choices learned on the task.

Source: Chand, Prabhu, Kumar (2023, arXiv 2312.13211); no code of the authors was found, so the block layout and the
straight-through rule are this project's reading. W is cut into blocks of ``width`` inputs; a block is S D, D [rank,
width] dense and S [out, rank] with exactly ``nonzeros`` in a row. Alternating pursuit finds a start for the weights;
then all factors learn the task together: S is the largest entries of a dense latent matrix, whose gradient reaches all
entries (straight-through factoriser), so that an atom can come in when the loss wants it. The pattern is fixed for the
last fifth of the steps. ``ratio`` is of the stored bits of these linears, indices counted; the rank follows from it.
Deviations: no decay at all of the latent matrix (the paper's would be smaller than float32 resolves); the dense weight
as latent is left out. Fused projections are factorised whole. Embeddings, head and classifier stay dense, so the whole
model shrinks less (both ratios are noted).
Cost: bytes on disk by the ratio. Multiplied out at load (``mode`` materialised) time and memory are the dense
linear's; ``factored`` computes rank * in + nonzeros * blocks * out multiply-adds, and is slower where gathers are.
Training holds a latent matrix of out * blocks * rank numbers a linear, more than the weight.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from leanformers.anatomy import Anatomy, is_conv1d
from leanformers.errors import LeanError
from leanformers.methods.base import Choice, Range, Saving, Subject, method, setting
from leanformers.parts.absent import AbsentLinear
from leanformers.parts.dense_sparse import DenseSparseLinear, check_sizes, dense_sparse_bits
from leanformers.parts.dictionary import factorise, ridge
from leanformers.surgery import FactoriseLinear
from leanformers.training import Penalty

_OTHERS = 0.1  # share of their ridge regression at which the atoms outside the pattern start
_WATCH = 50  # steps between two looks at how much the pattern changes


@method("dsformer", stock=False, stage="structure", order=21, trains=True, needs=("text",), paper="Chand et al. (2023)")
@dataclass(frozen=True, kw_only=True)
class DSFormer:
    """Factorise the linears of the layers into dictionaries and a few atoms a row, learned on the task."""

    ratio: float = setting(2.8, low=1.0, help="stored bits before over after, of the linears that are factorised")
    width: int = setting(32, low=1, help="inputs of a block")
    nonzeros: int = setting(4, low=1, help="atoms of a row in a block")
    roles: tuple[str, ...] = setting(
        ("query", "key", "value", "output", "gate", "up", "down"), help="which linears are factorised"
    )
    iterations: int = setting(15, low=0, help="of the start: pursuit and dictionary in turns")
    epochs: float = setting(5.0, low=0.0, help="of training; 0 leaves the start")
    straight_through: bool = setting(True, help="let the pattern change in training")
    settled: float = setting(0.2, low=0.0, high=1.0, help="share of the steps, at the end, with a fixed pattern")
    factor_learning_rate: float = setting(2e-4, low=0.0, help="of dictionaries and coefficients")
    learning_rate: float = setting(3e-5, low=0.0, help="of all else")
    batch_size: int = setting(32, low=1, help="examples per step")
    limit: int | None = setting(None, low=1, help="training examples used at most")
    distil: bool = setting(False, help="learn the outputs of the model as it comes, as much as the labels")
    mode: Literal["materialised", "factored"] = setting(
        "materialised", help="multiply out at load, or compute with factors"
    )

    def __call__(self, subject: Subject) -> None:
        if (reason := self.refuses(subject.anatomy, subject.task)) is not None:
            raise LeanError(f"method 'dsformer' does not suit this model: {reason}")
        if self.epochs > 0 and self.distil and subject.teacher is None:
            from leanformers.training import Teacher

            subject.teacher = Teacher(copy.deepcopy(subject.model).eval(), subject.task, subject.tokenizer)
        before = bits = 0
        whole = sum(8 * p.numel() * p.element_size() for p in subject.model.parameters())
        parts: list[DenseSparseLinear] = []
        weights = self._weights(subject.anatomy)
        for path in list(weights):
            weight = weights.pop(path)  # so that it can be freed when its factors are there
            rank = self._rank(weight)
            factors = factorise(weight, self.width, rank, self.nonzeros, iterations=self.iterations)
            before += 8 * weight.numel() * weight.element_size()
            bits += self._bits(weight, rank)
            others = None
            if self.epochs > 0 and self.straight_through:
                others = _OTHERS * ridge(weight, factors.dictionary)
            subject.apply(self._edit(path, rank), **factors._asdict())
            part = subject.anatomy.module(path)
            parts.append(part)
            if others is not None:
                part.loosen(others)
        subject.notes["factorised"] = len(parts)
        subject.notes["ratio"] = {"linears": before / bits, "model": whole / (whole - before + bits)}
        self._train(subject, parts)

    def _train(self, subject: Subject, parts: Sequence[DenseSparseLinear]) -> None:
        if self.epochs == 0:
            return
        from leanformers.training import Distillation

        factoriser = Factoriser(parts, self)
        try:
            subject.train(
                self.epochs,
                self.learning_rate,
                distillation=Distillation(alpha=0.5, temperature=1.0) if self.distil else None,
                batch_size=self.batch_size,
                limit=self.limit,
                penalty=factoriser,
            )
        finally:
            for part in parts:
                if part.latent is not None:
                    part.harden()
        subject.notes["pattern_changes"] = factoriser.changes

    # -- sizes ---------------------------------------------------------------------------------------------------

    def _weights(self, anatomy: Anatomy) -> dict[str, torch.Tensor]:
        """The weights [out, in] to factorise, fused ones whole, by path."""
        linears = anatomy.linears()
        paths = [path for path in anatomy.paths(self.roles) if not isinstance(linears[path].module, AbsentLinear)]
        return {path: linears[path].weight().detach() for path in paths}

    def _rank(self, weight: torch.Tensor) -> int:
        out_features, in_features = weight.shape
        return rank_of(self.ratio, out_features, in_features, self.width, self.nonzeros, 8 * weight.element_size())

    def _bits(self, weight: torch.Tensor, rank: int) -> int:
        out_features, in_features = weight.shape
        bits = 8 * weight.element_size()
        return dense_sparse_bits(out_features, in_features, rank, self.width, self.nonzeros, bits)

    def _edit(self, path: str, rank: int) -> FactoriseLinear:
        return FactoriseLinear(
            path=path, kind="dense_sparse", rank=rank, width=self.width, nonzeros=self.nonzeros, mode=self.mode
        )

    def refuses(self, anatomy: Anatomy, task: Any) -> str | None:
        weights = self._weights(anatomy)
        if not weights:
            return "it has no linears of these roles"
        for path, weight in weights.items():
            module = anatomy.module(path)
            if type(module) is not torch.nn.Linear and not is_conv1d(module):
                return f"{path} is a {type(module).__name__}: factorise plain linears, before other edits on them"
            out_features, in_features = weight.shape
            if in_features % self.width:
                return f"blocks of {self.width} inputs do not divide the {in_features} of {path}: set another width"
            rank = self._rank(weight)
            if check_sizes(out_features, in_features, rank, self.width, self.nonzeros) is not None:
                return (
                    f"at a ratio of {self.ratio}, {path} has room for {max(rank, 0)} atoms beside {self.nonzeros} "
                    "coefficients a row: lower ratio or nonzeros, or raise width"
                )
        return None

    def estimate(self, anatomy: Anatomy, length: int = 128) -> Saving:
        parameters = saved = flops = 0
        for path, weight in self._weights(anatomy).items():
            rank = self._rank(weight)
            cost = self._edit(path, rank).cost(anatomy)
            parameters, flops = parameters + cost.parameters, flops + cost.flops(length)
            saved += weight.numel() * weight.element_size() - self._bits(weight, rank) // 8
        return Saving(parameters=parameters, bytes=-saved, flops=flops)

    @classmethod
    def space(cls) -> dict[str, Choice | Range]:
        return {"ratio": Choice((2.0, 2.8, 3.57)), "iterations": Choice((4,)), "epochs": Choice((2.0,))}

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return []  # it saves bytes alone, and its training is slow on a CPU: a search tries it when asked to


class Factoriser(Penalty):
    """What the training of factors needs: rates of their own, atoms of unit norm, a pattern that settles. No loss."""

    def __init__(self, parts: Sequence[DenseSparseLinear], settings: DSFormer) -> None:
        super().__init__()
        self.parts, self.settings = tuple(parts), settings  # not as submodules: they are the model's
        self.changes: dict[int, float] = {}  # step -> share of the used coefficients that it replaced
        self._before: list[torch.Tensor] = []

    def forward(self) -> torch.Tensor:
        return torch.zeros((), device=self.parts[0].packed.device)

    def groups(self) -> list[dict[str, Any]]:
        factors = [part.dictionary for part in self.parts]
        factors += [part.values if part.latent is None else part.latent for part in self.parts]
        return [{"params": factors, "lr": self.settings.factor_learning_rate, "weight_decay": 0.0}]

    def after_step(self, model: Any, step: int, total: int) -> None:
        loose = [part for part in self.parts if part.latent is not None]
        if not loose:
            return
        self._watch(loose, step)
        epoch = total / self.settings.epochs
        if step // epoch > (step - 1) // epoch:
            for part in loose:
                part.renormalise()
        if step >= (1 - self.settings.settled) * total:
            for part in loose:
                part.settle()

    def _watch(self, parts: Sequence[DenseSparseLinear], step: int) -> None:
        if step % _WATCH == 0:
            self._before = [part.mask for part in parts]
        elif self._before:
            pairs = [(before, part.mask) for before, part in zip(self._before, parts, strict=True)]
            used = sum(int(before.sum()) for before, _ in pairs)
            self.changes[step] = sum(int((before & ~now).sum()) for before, now in pairs) / used
            self._before = []


def rank_of(ratio: float, out_features: int, in_features: int, width: int, nonzeros: int, bits: int) -> int:
    """The most atoms whose factors take no more than 1 / ratio of the weight's bits, and no more than there are rows;
    0 or less where none do.

    An index takes ceil(log2 rank) bits, so every number of bits is tried.
    """
    budget = bits * out_features * in_features / ratio
    coefficients = out_features * nonzeros * (in_features // width)
    ranks = [
        min(int((budget - coefficients * (bits + size)) // (bits * in_features)), 1 << size) for size in range(1, 33)
    ]
    return min(max(ranks), out_features)
