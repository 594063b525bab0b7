"""Text classification and regression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from .base import Batch, Feature, Predict, Row, Task
from .metrics import accuracy, macro_f1, spearman

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TextClassification(Task):
    """Rows {"text": str, "label": str}; labels are numbered in the order of `labels`.

    Outputs are logits [batch, classes]; quality is accuracy (or macro F1).
    """

    kind = "text-classification"
    metrics: ClassVar[Mapping[str, str]] = {"accuracy": "higher", "macro_f1": "higher"}

    def __init__(self, name: str, splits: Mapping[str, Sequence[Row]], *, labels: Sequence[str], **kwargs: Any):
        super().__init__(name, splits, **kwargs)
        self.labels: list[str] = list(labels)

    def _tokenise(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Feature]:
        number = {label: i for i, label in enumerate(self.labels)}
        features = self._encode(tokenizer, [row["text"] for row in rows])
        return [{**feature, "labels": number[row["label"]]} for feature, row in zip(features, rows, strict=True)]

    def _outputs(self, model: PreTrainedModel, inputs: Batch) -> Tensor:
        return model(**inputs).logits  # [batch, classes]

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float(), labels)

    def _evaluate(
        self, predict: Predict, tokenizer: PreTrainedTokenizerBase, features: list[Feature], batch_size: int
    ) -> dict[str, float]:
        logits = self._predictions(predict, tokenizer, features, batch_size)
        labels = self.collate(tokenizer, [{"labels": f["labels"]} for f in features])["labels"]
        predicted = logits.argmax(-1)
        return {
            "accuracy": accuracy(predicted, labels),
            "macro_f1": macro_f1(predicted, labels),
            "loss": self._loss(logits, labels).item(),
        }


class TextRegression(Task):
    """Rows {"text": str, "label": float}. Outputs are numbers [batch]; loss is the mean squared error."""

    kind = "text-regression"
    metrics: ClassVar[Mapping[str, str]] = {"spearman": "higher", "mse": "lower"}

    def _tokenise(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Feature]:
        features = self._encode(tokenizer, [row["text"] for row in rows])
        return [{**f, "labels": float(row["label"])} for f, row in zip(features, rows, strict=True)]

    def _outputs(self, model: PreTrainedModel, inputs: Batch) -> Tensor:
        return model(**inputs).logits.squeeze(-1)  # [batch]

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(outputs.float(), labels.float())

    def _evaluate(
        self, predict: Predict, tokenizer: PreTrainedTokenizerBase, features: list[Feature], batch_size: int
    ) -> dict[str, float]:
        predicted = self._predictions(predict, tokenizer, features, batch_size)
        labels = self.collate(tokenizer, [{"labels": f["labels"]} for f in features])["labels"]
        return {"spearman": spearman(predicted, labels), "mse": self._loss(predicted, labels).item()}
