"""The real batches on which models are timed and counted.

Every model that is compared gets the same rows in the same groups, tokenised and padded by its own tokenizer,
and no batch is padded beyond its own longest row. Rows of like length are grouped, as a careful server would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from leanformers.errors import LeanError

Batch = dict[str, Any]
Rows = list[dict[str, Any]]


class Measurable(Protocol):
    """What measuring needs of a task (see `leanformers.tasks.Task`)."""

    name: str
    metric: str

    @property
    def better(self) -> str: ...

    def features(self, tokenizer: Any, split: str = ..., limit: int | None = None) -> Rows: ...
    def collate(self, tokenizer: Any, features: Any) -> Batch: ...
    def forward(self, model: Any, batch: Batch) -> torch.Tensor: ...
    def evaluate(
        self,
        predict: Callable[[Batch], torch.Tensor],
        tokenizer: Any,
        split: str = "test",
        limit: int | None = None,
        batch_size: int | None = None,
    ) -> dict[str, float]: ...
    def quality(self, metrics: Mapping[str, float]) -> float: ...


@dataclass(frozen=True, kw_only=True)
class RealBatches:
    """Batches of one tokenizer, with what is in them: rows, real tokens and padded positions of each."""

    batches: tuple[Batch, ...]
    examples: tuple[int, ...]
    tokens: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def padding(self) -> float:
        """Share of the positions that is padding."""
        return 1.0 - sum(self.tokens) / max(1, sum(self.positions))

    def keep(self, indices: Sequence[int]) -> RealBatches:
        """Only the batches at `indices`."""
        return RealBatches(
            batches=tuple(self.batches[i] for i in indices),
            examples=tuple(self.examples[i] for i in indices),
            tokens=tuple(self.tokens[i] for i in indices),
            positions=tuple(self.positions[i] for i in indices),
        )


def _length(feature: Mapping[str, Any]) -> int:
    return sum(len(v) for k, v in feature.items() if k.endswith("input_ids"))


def batch_tokens(batch: Batch) -> tuple[int, int]:
    """(real tokens, padded positions) of a batch by its attention masks (by its ids if it has none)."""
    masks = [v for k, v in batch.items() if k.endswith("attention_mask") and torch.is_tensor(v)]
    if masks:
        return sum(int((mask != 0).sum()) for mask in masks), sum(mask.numel() for mask in masks)
    ids = [v for k, v in batch.items() if k.endswith("input_ids") and torch.is_tensor(v)]
    count = sum(v.numel() for v in ids)
    return count, count


def describe_batches(batches: Iterable[Batch]) -> RealBatches:
    """Count rows, tokens and positions of given batches."""
    given = tuple(batches)
    rows = tuple(next((v.shape[0] for v in batch.values() if torch.is_tensor(v)), 0) for batch in given)
    counts = [batch_tokens(batch) for batch in given]
    return RealBatches(
        batches=given,
        examples=rows,
        tokens=tuple(c[0] for c in counts),
        positions=tuple(c[1] for c in counts),
    )


def real_batches(
    task: Measurable,
    tokenizers: Mapping[str, Any],
    *,
    batch_size: int = 16,
    count: int = 8,
    split: str = "test",
) -> dict[str, RealBatches]:
    """For each tokenizer at most `count` batches of `batch_size` rows of the split: the same texts for all.

    Groups follow the lengths under the first tokenizer, longest first; a last, incomplete batch is left out
    unless it is the only one. Where tokenizers cut the same rows into different numbers of chunks (long texts
    of a language model), each groups the chunks of the same rows for itself and leaves none out.

    Raises:
        LeanError: the split is empty.
    """
    limit = batch_size * count
    features = {name: task.features(tok, split, limit) for name, tok in tokenizers.items()}
    first = next(iter(features.values()))
    if not len(first):
        raise LeanError(f"The split {split!r} of task {task.name!r} has no rows to measure on: add rows to it.")
    if all(len(rows) == len(first) for rows in features.values()):
        shared = _groups(first[:limit], batch_size, drop=True)
        return {
            name: describe_batches(task.collate(tokenizers[name], [rows[i] for i in group]) for group in shared)
            for name, rows in features.items()
        }
    rows_kept = limit
    while rows_kept > 1 and len(first) > limit:
        rows_kept = min(rows_kept - 1, max(1, rows_kept * limit // len(first)))
        first = task.features(next(iter(tokenizers.values())), split, rows_kept)
    found = {}
    for name, tokenizer in tokenizers.items():
        rows = task.features(tokenizer, split, rows_kept)
        groups = _groups(rows, batch_size, drop=False)
        found[name] = describe_batches(task.collate(tokenizer, [rows[i] for i in group]) for group in groups)
    return found


def arriving_batches(
    task: Measurable, tokenizer: Any, *, batch_size: int = 16, count: int = 8, split: str = "test"
) -> RealBatches:
    """At most `count` batches of the split's first rows in the order in which they stand, each padded to its longest.

    Raises:
        LeanError: the split is empty.
    """
    rows = task.features(tokenizer, split, batch_size * count)[: batch_size * count]
    if not len(rows):
        raise LeanError(f"The split {split!r} of task {task.name!r} has no rows to measure on: add rows to it.")
    groups = [rows[low : low + batch_size] for low in range(0, len(rows), batch_size)]
    whole = groups[:-1] if len(groups) > 1 and len(groups[-1]) < batch_size else groups
    return describe_batches(task.collate(tokenizer, group) for group in whole)


def _groups(features: Rows, batch_size: int, *, drop: bool) -> list[list[int]]:
    """Indices of the features in batches of like length, longest first; `drop`: no incomplete last one."""
    order = sorted(range(len(features)), key=lambda i: (-_length(features[i]), i))
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return groups[:-1] if drop and len(groups) > 1 and len(groups[-1]) < batch_size else groups


def spread(total: int, wanted: int) -> list[int]:
    """`wanted` indices spread evenly over range(total), the middle one if it is 1."""
    wanted = max(1, min(wanted, total))
    return [int((i + 0.5) * total / wanted) for i in range(wanted)]
