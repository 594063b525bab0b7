"""oBERT: zero the weights that the loss misses least by second order, and let the others make up for them.

Source: Kurtic et al. (EMNLP 2022, arXiv 2203.07259), The Optimal BERT Surgeon. The empirical Fisher of each linear of
the blocks, in diagonal blocks of ``block_size`` consecutive weights, is inverted from ``gradients`` gradients of small
batches. A weight scores w^2 / (2 [F^-1]_qq); ``pattern`` 4-block scores and prunes four inputs of a row together. The
scores of all linears are pooled, the lowest go (masks only grow), and the rest moves by the sum of the optimal
updates. One shot by default; the paper's 30 epochs are ``steps=7, dense_epochs=2, cycle_epochs=4,
initial_sparsity=0.7``: a cubic schedule, the learning rate rewound after every step, distillation from the dense model.
Deviations: ``recomputations`` is the reference code's, not the paper's; the rate falls to zero in a cycle instead of a
tenth; the teacher is the recipe's, or the dense model as it comes. Embeddings, norms, biases and head stay.
Where the inverse does not fit ``memory``, linears take turns, and gradients are computed twice for each turn: the
threshold needs all scores before any weight moves. The result is the same.
Cost: ``gradients`` forward and backward passes a step; 4 n B bytes and 4 n B FLOPs a gradient (block_size 1, the
diagonal Fisher, makes it 4 n bytes and moves no other weight). The zeros save nothing until a format or a kernel uses
them: a GPU is not faster for them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.methods.base import Choice, Range, Subject, method, setting
from leanformers.methods.pruning import drop_smallest, global_counts, hold, mask_of, prunable
from leanformers.parts.quantised import QuantisedLinear
from leanformers.training import fisher

_log = logging.getLogger(__name__)
_TINY = torch.finfo(torch.float32).tiny  # the least score of a live weight: pruned ones score 0 and stay first
_GROUP = {"unstructured": 1, "4-block": 4}
_SHARE = 0.6  # of the free memory, for the inverse


@method("obert", stock=False, stage="structure", order=31, trains=True, needs=("labels",), paper="Kurtic et al. (2022)")
@dataclass(frozen=True, kw_only=True)
class Obert:
    """Mask the weights that the loss misses least, by second order, and move the others to make up for them."""

    sparsity: float = setting(0.5, low=0.0, high=0.999, help="share of the block weights that becomes zero")
    pattern: Literal["unstructured", "4-block"] = setting("unstructured", help="4-block: four inputs of a row together")
    gradients: int = setting(1024, low=1, help="gradients in the Fisher")
    gradient_batch: int = setting(8, low=1, help="examples whose mean loss gives one gradient")
    damp: float = setting(1e-7, low=1e-12, help="added to the Fisher's diagonal; too much is magnitude pruning")
    block_size: int | None = setting(None, low=1, help="by default 50, and 32 for 4-block; 1 is the diagonal Fisher")
    compensate: bool = setting(True, help="move the weights that stay")
    recomputations: int = setting(1, low=1, help="sub-steps of a step, each with a Fisher of its own")
    memory: float | None = setting(None, low=0.0, help="GiB for the inverse; by default 60 % of what is free")
    steps: int = setting(1, low=1, help="pruning steps, each followed by training")
    initial_sparsity: float = setting(0.7, low=0.0, high=0.999, help="of the first step where there are several")
    dense_epochs: float = setting(0.0, low=0.0, help="training before the first step")
    cycle_epochs: float = setting(0.0, low=0.0, help="training after each step")
    learning_rate: float = setting(8e-5, low=0.0, help="at the start of each cycle")
    batch_size: int = setting(16, low=1, help="examples per training step")
    temperature: float = setting(2.0, low=0.01, help="of the distillation")
    distil: bool = setting(True, help="train on the dense model's outputs alone; else on the labels")

    def __call__(self, subject: Subject) -> None:
        present = _present(subject.anatomy)
        if self.sparsity < present:
            raise LeanError(
                f"method 'obert': {present:.1%} of the block weights are masked already and stay so: ask for a "
                f"sparsity above that, not {self.sparsity:.1%}."
            )
        if self._trains and self.distil and subject.teacher is None:
            from leanformers.training import Teacher

            subject.teacher = Teacher(copy.deepcopy(subject.model).eval(), subject.task, subject.tokenizer)
        self._train(subject, self.dense_epochs)
        for number, target in enumerate(self._targets()):
            start = _present(subject.anatomy)
            for part in range(1, self.recomputations + 1):
                level = start + (target - start) * part / self.recomputations
                self._prune(subject, level, seed=subject.seed + 1009 * (number * self.recomputations + part))
            self._train(subject, self.cycle_epochs)
        subject.notes["sparsity"] = _present(subject.anatomy)

    @property
    def _trains(self) -> bool:
        return self.dense_epochs > 0 or self.cycle_epochs > 0

    @property
    def _block(self) -> int:
        return self.block_size or (50 if self.pattern == "unstructured" else 32)

    def _targets(self) -> list[float]:
        """The sparsity after each step: cubic from the initial one to the last."""
        first, last = min(self.initial_sparsity, self.sparsity), self.sparsity
        return [last + (first - last) * (1 - i / (self.steps - 1)) ** 3 for i in range(self.steps - 1)] + [last]

    def _train(self, subject: Subject, epochs: float) -> None:
        if epochs > 0:
            from leanformers.training import Distillation

            loss = Distillation(alpha=1.0, temperature=self.temperature) if self.distil else None
            subject.train(epochs, self.learning_rate, distillation=loss, batch_size=self.batch_size, warmup=0.0)

    # -- one step ------------------------------------------------------------------------------------------------

    def _prune(self, subject: Subject, level: float, seed: int) -> None:
        """Bring the sparsity to ``level``."""
        anatomy, group = subject.anatomy, _GROUP[self.pattern]
        weights = dict(prunable(anatomy))
        total = round(level * sum(weight.numel() for weight in weights.values()) / group)
        masks = {path: mask_of(anatomy.module(path)) for path in weights}
        if total <= sum(int((~_live(mask, group)).sum()) for mask in masks.values() if mask is not None):
            return
        del anatomy  # it would keep the linears that are masked one by one
        passes = self._passes(subject, weights)
        scores: dict[str, Tensor] = {}  # [weights / group] each; on the CPU, since all are held together
        inverses: dict[str, fisher.BlockFisher] = {}
        for paths in passes:
            inverses = self._inverses(subject, paths, seed)
            for path, inverse in inverses.items():
                score = inverse.scores(weights[path], group).clamp_min(_TINY)
                mask = masks[path]
                scores[path] = (score if mask is None else score * _live(mask, group)).cpu()
        counts = global_counts(scores.items, total)
        waiting: dict[str, tuple[Tensor, Tensor]] = {}  # where linears take turns, none moves before the last has
        for paths in passes:
            if len(passes) > 1:
                inverses = self._inverses(subject, paths, seed)
            for path in paths:
                kept = drop_smallest(scores.pop(path).to(weights[path].device), counts[path])
                mask = kept.repeat_interleave(group).view(weights[path].shape)
                weight = self._moved(weights[path].detach(), masks[path], mask, inverses.pop(path))
                if len(passes) > 1:
                    waiting[path] = weight.cpu(), mask.cpu()
                else:
                    _settle(subject, path, weights.pop(path), weight, mask)
        for path in list(waiting):
            _settle(subject, path, weights.pop(path), *waiting.pop(path))

    def _moved(self, weight: Tensor, before: Tensor | None, mask: Tensor, inverse: fisher.BlockFisher) -> Tensor:
        """The weight [out, in] with the update for what the mask takes away and the one before did not."""
        if not self.compensate:
            return weight
        newly = ~mask if before is None else ~mask & before
        return weight + inverse.compensation(weight, newly, _GROUP[self.pattern]).view(weight.shape)

    def _inverses(self, subject: Subject, paths: Sequence[str], seed: int) -> dict[str, fisher.BlockFisher]:
        """The inverse Fisher of each of these linears, by as many gradients of training batches."""
        linears = subject.anatomy.linears()
        inverses = {
            path: fisher.BlockFisher(
                linears[path].weight().numel(),
                self._block,
                self.damp,
                self.gradients,
                device=linears[path].weight().device,
            )
            for path in paths
        }

        def take(path: str, gradient: Tensor) -> None:
            inverses[path].add(gradient.t() if linears[path].transposed else gradient)

        fisher.stream_gradients(
            subject.model,
            subject.task,
            subject.tokenizer,
            {path: linears[path].module.weight for path in paths},
            take,
            count=self.gradients,
            batch_size=self.gradient_batch,
            seed=seed,
            progress=subject.progress,
            label=f"Fisher of {len(paths)} linears",
        )
        for path, inverse in inverses.items():
            if not inverse.gradients:
                _log.warning("obert: no gradient reaches %s, which is pruned by magnitude alone", path)
        return inverses

    def _passes(self, subject: Subject, weights: dict[str, Tensor]) -> list[list[str]]:
        """The linears in turns whose inverses fit the memory together."""
        device = next(iter(weights.values())).device
        free = fisher.free_memory(device) if self.memory is None else None
        allowed = _SHARE * free if free is not None else None if self.memory is None else self.memory * 2**30
        sizes = {path: fisher.fisher_bytes(weight.numel(), self._block) for path, weight in weights.items()}
        largest = max(sizes, key=lambda path: sizes[path])
        if allowed is not None and sizes[largest] > allowed:
            raise LeanError(
                f"method 'obert': the inverse Fisher of {largest} takes {sizes[largest] / 2**30:.2f} GiB, and "
                f"{allowed / 2**30:.2f} GiB are there for it: lower block_size ({self._block}; 1 takes "
                f"{fisher.fisher_bytes(weights[largest].numel(), 1) / 2**30:.2f} GiB) or raise memory."
            )
        passes: list[list[str]] = [[]]
        taken = 0
        for path, size in sizes.items():
            if allowed is not None and passes[-1] and taken + size > allowed:
                passes.append([])
                taken = 0
            passes[-1].append(path)
            taken += size
        whole = sum(sizes.values())
        _log.info("obert: the inverse Fisher takes %.2f GiB, in %d passes", whole / 2**30, len(passes))
        subject.notes["fisher"] = {"bytes": whole, "passes": len(passes)}
        return passes

    # -- what suits ----------------------------------------------------------------------------------------------

    def refuses(self, anatomy: Anatomy, task: Any) -> str | None:
        linears = prunable(anatomy)
        if not linears:
            return "it has no plain linears left to mask"
        for path, projection in anatomy.linears().items():
            if isinstance(projection.module, QuantisedLinear):
                return f"{path} is quantised: prune before quantising"
        for path, weight in linears:
            if self.pattern == "4-block" and (reason := self._ungrouped(path, weight, anatomy)):
                return reason
            table = getattr(anatomy.embeddings, "weight", None)
            if table is not None and (
                weight is table or (weight.data_ptr() == table.data_ptr() and not weight.is_meta)
            ):
                return f"{path} is tied to the embeddings, which stay dense"
        if self.steps > 1 and not self.cycle_epochs:
            return "several steps need training between them: set cycle_epochs, or take recomputations instead"
        return None

    def _ungrouped(self, path: str, weight: Tensor, anatomy: Anatomy) -> str | None:
        """Why a linear cannot be pruned in groups of four."""
        rows, columns = weight.shape
        if self._block % 4 or columns % 4 or weight.numel() % self._block:
            return (
                f"4-block needs a block_size that is a multiple of 4 and divides {path} ({rows} x {columns}, inputs in "
                f"fours), not {self._block}"
            )
        mask = mask_of(anatomy.module(path))
        if mask is not None and not mask.is_meta and bool((mask.view(-1, 4) != mask.view(-1, 4)[:, :1]).any()):
            return f"{path} has single zeros, which 4-block cannot count: take pattern unstructured"
        return None

    @classmethod
    def space(cls) -> dict[str, Choice | Range]:
        # For those who name it: a Fisher that an estimate can afford.
        affordable: dict[str, tuple[int, ...]] = {"gradients": (32,), "gradient_batch": (2,), "block_size": (16,)}
        return {"sparsity": Choice((0.3, 0.5)), **{name: Choice(values) for name, values in affordable.items()}}

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return []  # single zeros save nothing that a search measures


def _live(mask: Tensor, group: int) -> Tensor:
    """Which groups still hold a weight: bool [weights / group]."""
    return mask.view(-1, group).any(1)


@torch.no_grad()
def _settle(subject: Subject, path: str, weight: Tensor, moved: Tensor, mask: Tensor) -> None:
    weight.copy_(moved)
    hold(subject, path, mask)


def _present(anatomy: Anatomy) -> float:
    """Share of the block weights that are masked."""
    weights = dict(prunable(anatomy))
    masks = [mask_of(anatomy.module(path)) for path in weights]
    gone = sum(int((~mask).sum()) for mask in masks if mask is not None)
    return gone / max(1, sum(weight.numel() for weight in weights.values()))
