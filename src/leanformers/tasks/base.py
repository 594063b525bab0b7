"""A task is data, collation, loss, metric and direction as one object.

Shapes used throughout: batch (examples), length (tokens, padded to the longest of the batch), classes, dim
(of an embedding), vocab. Loss is in nats, mean over the positions that count.

Examples are kept in a fixed shuffled order, so `limit=n` is always the first n of that order and an index
into `features(tokenizer, split)` stays valid whatever the limit.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import LeanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]
Feature = dict[str, Any]
Batch = dict[str, Tensor]
Predict = Callable[[Batch], Tensor]

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
IGNORED = -100
_KEPT_FEATURES = 12


class Task:
    """Base of the five kinds; `leanformers.tasks.task(...)` makes one.

    Args:
        name: what reports call it.
        splits: "train", "validation" and "test", each a list of raw rows.
        max_length: longest input in tokens; longer texts are cut (language modelling: split, nothing is
            lost).
        metric: the one that counts as quality; None takes the kind's own.
        source: what `task(...)` was given, so that a recipe can name it again.
        options: the options given with it.
        provenance: where the data come from (versions of packages, files); part of the fingerprint.
    """

    kind: ClassVar[str]
    metrics: ClassVar[Mapping[str, str]]  # name -> "higher" or "lower"; the first is the default
    batch_size: ClassVar[int] = 32  # of evaluation
    labels: list[str] | None = None
    needs_teacher: bool = False  # True where the targets are a teacher's outputs

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Sequence[Row]],
        *,
        max_length: int = 128,
        metric: str | None = None,
        source: str | None = None,
        options: Mapping[str, Any] | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> None:
        if max_length < 4:
            raise LeanError(f"task {name}: max_length is {max_length}; give at least 4 tokens.")
        self.name = name
        self.splits: dict[str, list[Row]] = {split: list(rows) for split, rows in splits.items()}
        self.max_length = max_length
        self.metric = metric or next(iter(self.metrics))
        if self.metric not in self.metrics:
            known = ", ".join(self.metrics)
            raise LeanError(f"task {name}: a {self.kind} task has no metric {self.metric!r}; choose {known}.")
        self.source = source or name
        self.options = dict(options or {})
        self.provenance = dict(provenance or {})
        self._features: OrderedDict[tuple[Any, ...], tuple[Any, list[Feature]]] = OrderedDict()
        self._fingerprint: str | None = None

    # ------------------------------------------------------------------ identity
    @property
    def better(self) -> str:
        """ "higher" or "lower": the direction of `metric`."""
        return self.metrics[self.metric]

    def settings(self) -> dict[str, Any]:
        """What besides the data decides the numbers (JSON)."""
        return {
            "kind": self.kind,
            "max_length": self.max_length,
            "metric": self.metric,
            "labels": self.labels,
        }

    @property
    def fingerprint(self) -> str:
        """Hash (16 hex digits) of rows, settings and provenance: where equal, numbers compare."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for part in (self.settings(), self.provenance, self.splits):
                digest.update(json.dumps(part, sort_keys=True, ensure_ascii=False, default=str).encode())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """For reports and recipes (JSON)."""
        return {
            "name": self.name,
            "source": self.source,
            "options": self.options,
            **self.settings(),
            "rows": {split: len(rows) for split, rows in self.splits.items()},
            "fingerprint": self.fingerprint,
            "provenance": self.provenance,
        }

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {len(rows)}" for split, rows in self.splits.items())
        return f"{type(self).__name__}({self.name!r}, {sizes}, max_length={self.max_length}, {self.metric})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_features": OrderedDict()}

    # ------------------------------------------------------------------ data
    def rows(self, split: str, limit: int | None = None) -> list[Row]:
        """The first `limit` raw rows of a split."""
        if split not in self.splits:
            raise LeanError(f"task {self.name} has no split {split!r}; it has {', '.join(self.splits)}.")
        return self.splits[split][:limit]

    def features(
        self, tokenizer: PreTrainedTokenizerBase, split: str = "train", limit: int | None = None
    ) -> list[Feature]:
        """Tokenised and unpadded examples of the first `limit` rows; the last dozen results are kept."""
        key = (id(tokenizer), len(tokenizer), split, limit)
        if key in self._features:
            self._features.move_to_end(key)
            return self._features[key][1]
        made = self._tokenise(tokenizer, self.rows(split, limit))
        self._features[key] = (tokenizer, made)  # holding the tokenizer keeps its id from being reused
        while len(self._features) > _KEPT_FEATURES:
            self._features.popitem(last=False)
        return made

    def collate(self, tokenizer: PreTrainedTokenizerBase, features: Sequence[Feature]) -> Batch:
        """Pad to the longest of the batch, on the right: lists to [batch, length], numbers to [batch].

        Fields other than the model's inputs and "labels" (an "index", say) are carried along.
        """
        pad = {"input_ids": tokenizer.pad_token_id or 0, "labels": IGNORED}
        batch: Batch = {}
        for field, first in features[0].items():
            values = [feature[field] for feature in features]
            if isinstance(first, list):
                length = max(map(len, values))
                fill = pad.get(field, 0)
                batch[field] = torch.tensor([v + [fill] * (length - len(v)) for v in values])
            elif isinstance(first, Tensor):
                batch[field] = torch.stack(values)
            else:
                batch[field] = torch.tensor(values, dtype=torch.float if isinstance(first, float) else None)
        return batch

    def batches(
        self,
        tokenizer: PreTrainedTokenizerBase,
        split: str = "test",
        batch_size: int | None = None,
        limit: int | None = None,
        sort: bool = True,
    ) -> Iterator[Batch]:
        """Batches in order of length, longest first (`sort`), or in the order of the rows."""
        features = self.features(tokenizer, split, limit)
        for indices in buckets(features, batch_size or self.batch_size, sort):
            yield self.collate(tokenizer, [features[i] for i in indices])

    def calibration(self, tokenizer: PreTrainedTokenizerBase, samples: int, batch_size: int = 8) -> Iterator[Batch]:
        """Batches of model inputs, without labels, from the first `samples` training rows."""
        for batch in self.batches(tokenizer, "train", batch_size, samples):
            yield self.inputs(batch)

    # ------------------------------------------------------------------ model
    @staticmethod
    def inputs(batch: Batch) -> Batch:
        """The part of a batch that a model takes."""
        return {field: batch[field] for field in MODEL_INPUTS if field in batch}

    def forward(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The tensor that the task compares; inputs are moved to the model's device."""
        device = getattr(model, "device", None)
        return self._outputs(model, {k: v.to(device) for k, v in self.inputs(batch).items()})

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Scalar task loss of `forward`'s outputs.

        Raises:
            LeanError: the batch holds no labels.
        """
        if "labels" not in batch:
            raise LeanError(f"task {self.name}: the batch has no labels; take it from features(), not calibration().")
        return self._loss(outputs, batch["labels"].to(outputs.device))

    @torch.no_grad()
    def evaluate(
        self,
        predict: Predict,
        tokenizer: PreTrainedTokenizerBase,
        split: str = "test",
        limit: int | None = None,
        batch_size: int | None = None,
    ) -> dict[str, float]:
        """All metrics of the kind. `predict` maps a batch to what `forward` returns."""
        features = self.features(tokenizer, split, limit)
        if not features:
            raise LeanError(f"task {self.name}: split {split!r} is empty, so nothing can be evaluated on it.")
        return self._evaluate(predict, tokenizer, features, batch_size or self.batch_size)

    def quality(self, metrics: Mapping[str, float]) -> float:
        """The metric that counts, in its own unit; `better` says which direction is good.

        Raises:
            LeanError: it was not measured (comparisons with a teacher need one).
        """
        if self.metric not in metrics:
            raise LeanError(f"task {self.name}: {self.metric} was not measured; attach the teacher it compares with.")
        return metrics[self.metric]

    def ratio(self, quality: float, baseline: float) -> float:
        """Quality relative to a baseline: above 1 is better than it, whatever the direction."""
        above, below = (quality, baseline) if self.better == "higher" else (baseline, quality)
        return above / below if below else float("nan")

    def save_extras(self, directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write what a checkpoint needs beside its weights: the tokenizer's files."""
        tokenizer.save_pretrained(str(directory))

    # ------------------------------------------------------------------ for the kinds
    def _tokenise(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Feature]:
        raise NotImplementedError

    def _outputs(self, model: PreTrainedModel, inputs: Batch) -> Tensor:
        raise NotImplementedError

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def _evaluate(
        self, predict: Predict, tokenizer: PreTrainedTokenizerBase, features: list[Feature], batch_size: int
    ) -> dict[str, float]:
        raise NotImplementedError

    def _encode(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Feature]:
        """Texts to features with special tokens, cut to max_length."""
        if not texts:
            return []
        encoded = tokenizer(list(texts), truncation=True, max_length=self.max_length, padding=False)
        fields = [field for field in MODEL_INPUTS if field in encoded]
        return [{field: list(encoded[field][i]) for field in fields} for i in range(len(texts))]

    def _predictions(
        self, predict: Predict, tokenizer: PreTrainedTokenizerBase, features: list[Feature], batch_size: int
    ) -> Tensor:
        """One row of outputs per example, in the order of the features: [examples, …], float32, CPU."""
        kept: list[Tensor | None] = [None] * len(features)
        for indices in buckets(features, batch_size, sort=True):
            outputs = predict(self.collate(tokenizer, [features[i] for i in indices])).float().cpu()
            for i, output in zip(indices, outputs, strict=True):
                kept[i] = output
        return torch.stack([output for output in kept if output is not None])


def buckets(features: Sequence[Feature], batch_size: int, sort: bool = True) -> list[list[int]]:
    """Indices of the features in batches, of like length and longest first where `sort`."""
    order = list(range(len(features)))
    if sort:
        order.sort(key=lambda i: len(features[i]["input_ids"]), reverse=True)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
