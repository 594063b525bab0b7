"""Sentence embeddings and retrieval: pairs of query and body, or texts alone.

With nothing but texts the targets are a teacher's vectors, and quality is how well its neighbourhoods are
kept. With pairs, quality is nDCG@10 of the queries among all bodies of the split, and training follows the
teacher too, unless `objective="pairs"` asks for the contrastive loss on the pairs themselves (multiple
negatives ranking).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LeanError
from .base import Batch, Feature, Predict, Row, Task
from .metrics import ndcg, neighbours
from .pooling import pool, write_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCALE = 20.0  # of the cosines in the contrastive loss; sentence-transformers' default


class Embedding(Task):
    """Rows {"query": str, "body": str} or {"text": str}.

    Features are single texts; a pair makes two, query then body (of row i: 2 i and 2 i + 1). Outputs are
    unit vectors [batch, dim]. With `objective="pairs"` a training feature is a pair and a batch of n pairs
    gives [2 n, dim]: the queries, then the bodies.
    """

    kind = "embedding"
    metrics: ClassVar[Mapping[str, str]] = {
        "ndcg@10": "higher",
        "old_index_ndcg@10": "higher",
        "neighbours@10": "higher",
        "cosine": "higher",
    }

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Sequence[Row]],
        *,
        objective: str = "teacher",
        query_prefix: str = "",
        body_prefix: str = "",
        metric: str | None = None,
        **kwargs: Any,
    ):
        self.pairs = any("query" in row for rows in splits.values() for row in rows[:1])
        if not self.pairs and metric is not None and "ndcg" in metric:
            raise LeanError(f"task {name}: {metric} needs pairs; give a query and a body column.")
        super().__init__(name, splits, metric=metric or ("ndcg@10" if self.pairs else "neighbours@10"), **kwargs)
        if objective not in ("teacher", "pairs") or (objective == "pairs" and not self.pairs):
            raise LeanError(
                f"task {name}: objective is {objective!r}; choose 'teacher', or 'pairs' where there are pairs."
            )
        self.objective = objective
        self.query_prefix, self.body_prefix = query_prefix, body_prefix
        self.needs_teacher = objective == "teacher"
        self._teacher: tuple[Predict, PreTrainedTokenizerBase] | None = None
        self._teacher_vectors: dict[tuple[str, int], Tensor] = {}

    def settings(self) -> dict[str, Any]:
        prefixes = [self.query_prefix, self.body_prefix]
        return {**super().settings(), "objective": self.objective, "prefixes": prefixes}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_teacher": None}

    # ------------------------------------------------------------------ the teacher
    def attach_teacher(self, predict: Predict, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the vectors of this model (the one before slimming) as the reference.

        From then on `evaluate` also gives cosine and neighbours@10 against it, and for pairs
        old_index_ndcg@10: this model's bodies stay in the index, the evaluated model encodes the queries.
        """
        self._teacher, self._teacher_vectors = (predict, tokenizer), {}

    def vectors(
        self,
        predict: Predict,
        tokenizer: PreTrainedTokenizerBase,
        split: str = "test",
        limit: int | None = None,
    ) -> Tensor:
        """Vectors of all texts of a split, in the order of its features: [texts, dim], float32 on the CPU."""
        with torch.no_grad():
            return self._predictions(predict, tokenizer, self._texts(tokenizer, split, limit), self.batch_size)

    def ndcg(self, query_vectors: Tensor, body_vectors: Tensor, split: str = "test", limit: int | None = None) -> float:
        """nDCG@10 of the queries of a split among its bodies, both [rows, dim]; equal bodies count as one."""
        places, relevant = distinct([row["body"] for row in self.rows(split, limit)])
        return ndcg(query_vectors, body_vectors[places], torch.tensor(relevant))

    def _reference(self, split: str, limit: int | None) -> Tensor | None:
        if self._teacher is None:
            return None
        key = (split, len(self.rows(split, limit)))
        if key not in self._teacher_vectors:
            self._teacher_vectors[key] = self.vectors(*self._teacher, split, limit)
        return self._teacher_vectors[key]

    # ------------------------------------------------------------------ features and batches
    def _texts(self, tokenizer: PreTrainedTokenizerBase, split: str, limit: int | None) -> list[Feature]:
        features = self.features(tokenizer, split, limit)
        if features and "body_input_ids" in features[0]:
            return [single for feature in features for single in _unpair(feature)]
        return features

    def _tokenise(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Feature]:
        if not self.pairs:
            return self._encode(tokenizer, [row["text"] for row in rows])
        queries = self._encode(tokenizer, [self.query_prefix + row["query"] for row in rows])
        bodies = self._encode(tokenizer, [self.body_prefix + row["body"] for row in rows])
        pairs = zip(queries, bodies, strict=True)
        if self.objective == "pairs":
            return [{**query, **{f"body_{k}": v for k, v in body.items()}} for query, body in pairs]
        return [single for pair in pairs for single in pair]

    def collate(self, tokenizer: PreTrainedTokenizerBase, features: Sequence[Feature]) -> Batch:
        if "body_input_ids" in features[0]:
            split = [_unpair(feature) for feature in features]
            features = [query for query, _ in split] + [body for _, body in split]
            batch = super().collate(tokenizer, features)
            # Row i + n is the body of query i: what the contrastive loss is to find.
            return {**batch, "labels": torch.arange(len(split), len(features))}
        return super().collate(tokenizer, features)

    # ------------------------------------------------------------------ model
    def _outputs(self, model: PreTrainedModel, inputs: Batch) -> Tensor:
        states = getattr(model, "base_model", model)(**inputs).last_hidden_state  # [batch, length, hidden_size]
        mode = getattr(getattr(model, "config", None), "sentence_pooling", "mean")
        return F.normalize(pool(states, inputs["attention_mask"], mode).float(), dim=-1)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """1 - cosine to the vectors in labels [batch, dim], or the contrastive loss (labels [pairs])."""
        if "labels" not in batch:
            raise LeanError(
                f"task {self.name} has no labels of its own: train with a teacher, or pass "
                "objective='pairs' where there are queries and bodies."
            )
        return super().loss(outputs, batch)

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if labels.dim() == 2:
            return (1 - F.cosine_similarity(outputs.float(), labels.float(), dim=-1)).mean()
        n = len(labels)
        scores = outputs[:n] @ outputs[n:].T * SCALE  # [queries, bodies]
        return F.cross_entropy(scores, labels - n)

    def evaluate(
        self,
        predict: Predict,
        tokenizer: PreTrainedTokenizerBase,
        split: str = "test",
        limit: int | None = None,
        batch_size: int | None = None,
        *,
        index: Tensor | None = None,
    ) -> dict[str, float]:
        """ndcg@10 for pairs; with a teacher attached the comparisons with it.

        `index`, [bodies, dim]: vectors of the bodies by another model, for old_index_ndcg@10 without a
        teacher.

        Raises:
            LeanError: texts alone and no teacher to compare with.
        """
        features = self._texts(tokenizer, split, limit)
        if len(features) < 2:
            raise LeanError(f"task {self.name}: split {split!r} has fewer than two texts to compare.")
        reference = self._reference(split, limit)
        if not self.pairs and reference is None:
            raise LeanError(
                f"task {self.name} has texts alone, so quality is agreement with a teacher: call "
                "task.attach_teacher(predict, tokenizer) first, or give query and body columns."
            )
        with torch.no_grad():
            vectors = self._predictions(predict, tokenizer, features, batch_size or self.batch_size)
        found: dict[str, float] = {}
        if self.pairs:
            found["ndcg@10"] = self.ndcg(vectors[::2], vectors[1::2], split, limit)
            if index is None and reference is not None:
                index = reference[1::2]
            if index is not None:
                if index.shape[1] != vectors.shape[1]:
                    found["old_index_ndcg@10"] = 0.0  # vectors of another width cannot be looked up in it
                else:
                    found["old_index_ndcg@10"] = self.ndcg(vectors[::2], index.float().cpu(), split, limit)
        if reference is not None:
            found["neighbours@10"] = neighbours(vectors, reference)
            if reference.shape == vectors.shape:
                found["cosine"] = F.cosine_similarity(vectors, reference, dim=-1).mean().item()
        return found

    # ------------------------------------------------------------------ saving
    def save_extras(self, directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tokenizer files, and those that make `SentenceTransformer(directory)` open the folder.

        Raises:
            LeanError: the model is not saved there yet; its width and pooling are read from it.
        """
        super().save_extras(directory, tokenizer)
        folder = Path(directory)
        if not (folder / "config.json").is_file():
            raise LeanError(f"{directory} holds no model yet; call model.save_pretrained there before save_extras.")
        write_modules(folder, self.max_length, self.query_prefix, self.body_prefix)


def distinct(bodies: Sequence[str]) -> tuple[list[int], list[int]]:
    """Where each different body stands first, and for every row which of those is its own."""
    number: dict[str, int] = {}
    places: list[int] = []
    for i, body in enumerate(bodies):
        if body not in number:
            number[body] = len(places)
            places.append(i)
    return places, [number[body] for body in bodies]


def _unpair(feature: Feature) -> tuple[Feature, Feature]:
    body = {k.removeprefix("body_"): v for k, v in feature.items() if k.startswith("body_")}
    return {k: v for k, v in feature.items() if not k.startswith("body_")}, body
