"""Essential sparsity: one-shot magnitude pruning of the pre-trained checkpoint, with the mask fixed ever after.

Source: Jaiswal, Liu, Chen, Wang (NeurIPS 2023, arXiv 2306.03805). The magnitudes of all block linears are pooled, and
the smallest share ``sparsity`` becomes zero (one global threshold), without data; fine-tuning, if any, follows as a
step of its own and keeps the zeros. ``pattern`` N:M keeps the N largest of every M consecutive inputs instead.
Embeddings, norms, biases and head stay. Deviations: exactly k weights are masked, ties broken by position, since
checkpoints that went through a coarse quantisation hold many equal magnitudes; the threshold is found by bisection
rather than by sorting the pool, so that one linear's scores are held at a time.
Cost: none is saved until a format or a kernel uses the zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.methods.base import Subject, method, setting
from leanformers.methods.pruning import drop_smallest, global_counts, prunable, weight_of
from leanformers.parts.masked import parse_pattern
from leanformers.surgery import MaskWeights


@method("essential-sparsity", stock=False, stage="structure", order=30, paper="Jaiswal et al. (2023)")
@dataclass(frozen=True, kw_only=True)
class EssentialSparsity:
    """Mask the smallest weights of the layers' linears."""

    sparsity: float = setting(0.3, low=0.0, high=0.999, help="share of the block weights that becomes zero")
    pattern: str = setting("unstructured", help="unstructured, or N:M with N kept of every M inputs")
    scope: Literal["global", "layer"] = setting("global", help="one threshold for all linears, or one each")
    scores: Literal["magnitude", "random"] = setting("magnitude", help="random is the baseline")

    def __call__(self, subject: Subject) -> None:
        if self.pattern != "unstructured":
            for path in [path for path, _ in prunable(subject.anatomy)]:
                score = self._score(path, weight_of(subject, path), subject.seed)
                subject.apply(MaskWeights(path=path, pattern=self.pattern), mask=keep_n_of_m(score, self.pattern))
            return
        for path, count in self._counts(prunable(subject.anatomy), subject.seed).items():
            mask = drop_smallest(self._score(path, weight_of(subject, path), subject.seed), count)
            subject.apply(MaskWeights(path=path), mask=mask)

    def _score(self, path: str, weight: torch.Tensor, seed: int) -> torch.Tensor:
        if self.scores == "magnitude":
            return weight.detach().abs().float()
        generator = torch.Generator().manual_seed(seed + sum(path.encode()))
        return torch.rand(weight.shape, generator=generator).to(weight.device)

    def _counts(self, linears: list[tuple[str, torch.Tensor]], seed: int) -> dict[str, int]:
        """How many weights of each linear go; together exactly round(sparsity * n)."""
        if self.scope == "layer":
            return {path: round(self.sparsity * weight.numel()) for path, weight in linears}
        total = round(self.sparsity * sum(weight.numel() for _, weight in linears))
        return global_counts(lambda: ((path, self._score(path, weight, seed)) for path, weight in linears), total)

    def refuses(self, anatomy: Anatomy, task: Any) -> str | None:
        if not prunable(anatomy):
            return "it has no plain linears left to mask"
        if self.pattern != "unstructured":
            for path, weight in prunable(anatomy):
                try:
                    parse_pattern(self.pattern, weight.shape[1])
                except LeanError as error:
                    return f"{path}: {error}"
        return None

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return []


def keep_n_of_m(score: torch.Tensor, pattern: str) -> torch.Tensor:
    """Bool mask [out, in] that keeps the N largest scores of every M consecutive inputs."""
    structure = parse_pattern(pattern, score.shape[1])
    if structure is None:
        return torch.ones_like(score, dtype=torch.bool)
    kept, group = structure
    grouped = score.view(score.shape[0], -1, group)
    rank = grouped.argsort(dim=-1, descending=True, stable=True)[..., :kept]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, rank, True).view(score.shape)
