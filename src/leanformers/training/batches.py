"""Training batches: examples grouped by length, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset

INDEX = "example_index"
# Batches whose examples are sorted together: more pad less, fewer mix lengths better.
_BUCKET = 50


def length_of(feature: dict[str, Any]) -> int:
    """Tokens of an example; the longest of its texts when it has several (`body_input_ids`)."""
    return max((len(value) for name, value in feature.items() if name.endswith("input_ids")), default=1)


class Examples(Dataset):  # type: ignore[type-arg]
    """Features with their place in the list, so that a batch can be matched with stored teacher outputs."""

    def __init__(self, features: Sequence[dict[str, Any]]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int, dict[str, Any]]:
        epoch, index = key
        return epoch, index, self.features[index]


class BucketSampler(BatchSampler):
    """Batches of (epoch, index) keys of examples of nearly equal length.

    Each epoch is shuffled, cut in groups of 50 batches, sorted by length within a group, and the batches are
    shuffled again. `epoch` is set by the trainer before each epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.batch_size = batch_size
        self.drop_last = False
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[Any]]:
        # An odd multiplier keeps (seed, epoch) pairs apart.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(len(self.lengths), generator=generator)
        batches: list[Tensor] = []
        for group in order.split(self.batch_size * _BUCKET):
            by_length = group[self.lengths[group].argsort(stable=True)]
            batches += by_length.split(self.batch_size)
        # The one short batch, if any, stays somewhere in the middle like any other.
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield [(self.epoch, index) for index in batches[place].tolist()]


class Collator:
    """Task.collate plus the examples' indices; its random choices depend on seed and batch alone."""

    def __init__(self, task: Any, tokenizer: Any, seed: int) -> None:
        self.task, self.tokenizer, self.seed = task, tokenizer, seed

    def __call__(self, examples: list[tuple[int, int, dict[str, Any]]]) -> dict[str, Any]:
        epochs, indices, features = zip(*examples, strict=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, epochs[0], indices)) % 2**63)
            batch = dict(self.task.collate(self.tokenizer, list(features)))
        batch[INDEX] = torch.tensor(indices)
        return batch


def counts(batch: dict[str, Any], kind: str, causal: bool) -> dict[str, float]:
    """What the losses divide by: rows, labels that count, real tokens, real (query, key) pairs."""
    found = {"rows": float(len(batch[INDEX])), "labels": 0.0, "tokens": 0.0, "pairs": 0.0}
    labels = batch.get("labels")
    if labels is not None:
        found["labels"] = found["rows"] if kind == "embedding" else float(counted_labels(labels, kind).sum())
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor):
        lengths = mask.sum(-1).double()
        found["tokens"] = float(lengths.sum())
        found["pairs"] = float((lengths * (lengths + 1) / 2 if causal else lengths.square()).sum())
    return found


def counted_labels(labels: Tensor, kind: str) -> Tensor:
    """Which labels count: bool [batch]; [batch, length - 1] for causal, [batch, length] for masked LMs."""
    if kind == "causal-lm":
        return labels[:, 1:] != -100
    if labels.is_floating_point():
        return labels.isfinite()
    return labels != -100
