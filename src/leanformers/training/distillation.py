"""Distillation: which losses, with which weights, and how the layers of teacher and student are matched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from leanformers.errors import LeanError
from leanformers.training import losses
from leanformers.training.batches import counted_labels
from leanformers.training.capture import Record

TOKEN_KINDS = ("causal-lm", "masked-lm")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The loss of a student with a teacher: alpha * output + (1 - alpha) * labels + weights * inner losses.

    alpha: share of the teacher's outputs; 1 needs no labels. None: 0.9 where there are labels, 1 for
        embeddings.
    temperature: of the output's softmax. None: 2 for classification, 1 for language models (Hinton: 2 to 4;
        two classes: 1 to 2), 0.05 for the similarities of an embedder.
    objective: None picks "kl" for logits, "cosine" for embeddings. Logits: "kl", "reverse_kl", "js".
        Embeddings: "cosine", "mse", "similarity". Regression has "mse" only.
    hidden: weight of the squared error of hidden states at layer outputs, summed over matched layers.
    match_embeddings: match the embeddings' output too (TinyBERT does).
    attention: weight of TinyBERT's squared error of attention scores, summed over matched layers.
    relation: weight of MiniLMv2's query, key and value relations of one layer.
    relation_heads: relation heads; None for the teacher's number of heads where it divides both widths.
    relation_layer: teacher layer whose relations the student's last layer learns; None for the last
        (MiniLMv2: 21 of 24 for BERT-large, 19 of 24 for RoBERTa-large).
    layer_map: for each student layer the teacher layer it imitates, from 0. After dropping layers these are
        the kept layers' own indices. None: the same index at equal depth, else every (teacher / student)-th
        layer.
    """

    alpha: float | None = None
    temperature: float | None = None
    objective: str | None = None
    hidden: float = 0.0
    match_embeddings: bool = True
    attention: float = 0.0
    relation: float = 0.0
    relation_heads: int | None = None
    relation_layer: int | None = None
    layer_map: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.layer_map is not None:
            object.__setattr__(self, "layer_map", tuple(self.layer_map))
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise LeanError(f"Distillation's alpha is a share between 0 and 1, not {self.alpha}.")
        if self.temperature is not None and not self.temperature > 0:
            raise LeanError(f"Distillation's temperature is above 0, not {self.temperature}.")
        for name in ("hidden", "attention", "relation"):
            if not getattr(self, name) >= 0:
                raise LeanError(f"Distillation's weight '{name}' is at least 0, not {getattr(self, name)}.")
        if self.relation_heads is not None and self.relation_heads < 1:
            raise LeanError(f"Distillation's relation_heads is at least 1, not {self.relation_heads}.")
        if self.layer_map is not None and any(layer < 0 for layer in self.layer_map):
            raise LeanError(f"Distillation's layer_map holds layer indices from 0, not {list(self.layer_map)}.")

    def resolved(self, kind: str) -> Distillation:
        """The same settings with the defaults of a task's kind filled in.

        Raises:
            LeanError: the objective is not one of the kind's.
        """
        embedding = kind == "embedding"
        allowed = {
            "embedding": ("cosine", "mse", "similarity"),
            "text-regression": ("mse",),
        }.get(kind, losses.OBJECTIVES)
        objective = self.objective or allowed[0]
        if objective not in allowed:
            raise LeanError(
                f"Distillation's objective {objective!r} does not suit a {kind} task; it is one of "
                f"{', '.join(allowed)}."
            )
        temperature = self.temperature
        if temperature is None:
            temperature = 0.05 if embedding else 1.0 if kind in TOKEN_KINDS else 2.0
        alpha = self.alpha if self.alpha is not None else 1.0 if embedding else 0.9
        return replace(self, alpha=alpha, temperature=temperature, objective=objective)

    @property
    def inner(self) -> bool:
        """Whether a loss looks inside the models, which takes a live teacher."""
        return self.hidden > 0 or self.attentive

    @property
    def attentive(self) -> bool:
        return self.attention > 0 or self.relation > 0


def match_layers(student: int, teacher: int, layer_map: Sequence[int] | None) -> list[int]:
    """Teacher layer of each student layer, from 0.

    Raises:
        LeanError: the map has another length or names a layer that is not there, or no map is given and the
            teacher's depth is no multiple of the student's.
    """
    if layer_map is not None:
        if len(layer_map) != student:
            raise LeanError(f"Distillation's layer_map has {len(layer_map)} entries for a student of {student} layers.")
        if max(layer_map) >= teacher:
            raise LeanError(
                f"Distillation's layer_map names layer {max(layer_map)} of a teacher with {teacher} layers."
            )
        return list(layer_map)
    if teacher % student:
        raise LeanError(
            f"The teacher's {teacher} layers are no multiple of the student's {student}; give Distillation a "
            "layer_map, the teacher layer for each student layer."
        )
    step = teacher // student
    return [step * (layer + 1) - 1 for layer in range(student)]


class DistillationLoss(nn.Module):
    """The loss of a batch. Holds what is learned beside the student (the projection of hidden states, W_h).

    Args:
        settings: any; defaults of `kind` are filled in.
        causal: whether the models' attention is causal.
        widths: (student, teacher) hidden sizes; where they differ one learned matrix serves all layers.
        depths: (student, teacher) numbers of layers.
    """

    def __init__(
        self,
        settings: Distillation,
        kind: str,
        *,
        causal: bool = False,
        widths: tuple[int, int] | None = None,
        depths: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings = settings.resolved(kind)
        self.kind = kind
        self.causal = causal
        self.layers: list[int] = []
        self.projection: nn.Module | None = None
        if settings.inner:
            if widths is None or depths is None:
                raise LeanError("Inner distillation losses need the models' widths and depths.")
            if settings.hidden or settings.attention or settings.layer_map is not None:
                self.layers = match_layers(*depths, settings.layer_map)
            if settings.relation_layer is not None and not 0 <= settings.relation_layer < depths[1]:
                raise LeanError(
                    f"Distillation's relation_layer {settings.relation_layer} is not a layer of a teacher "
                    f"with {depths[1]} layers."
                )
            if settings.hidden and widths[0] != widths[1]:
                self.projection = nn.Linear(widths[0], widths[1], bias=False)

    def forward(
        self,
        outputs: Tensor,
        target: Any,
        batch: dict[str, Any],
        counts: dict[str, float],
        student: Record | None = None,
        teacher: Record | None = None,
    ) -> Tensor:
        """alpha * output loss + inner losses; the caller adds (1 - alpha) * labels.

        outputs: the student's, as Task.forward gives them. target: the teacher's, or its stored top-k (a
            tuple).
        counts: what to divide by (`batches.counts`), over the whole accumulated batch.
        """
        settings = self.settings
        assert settings.alpha is not None
        loss = settings.alpha * self._output_loss(outputs, target, batch, counts) if settings.alpha else 0.0
        if settings.inner:
            assert student is not None and teacher is not None
            mask = batch["attention_mask"]
            if settings.hidden:
                loss = loss + settings.hidden * self._hidden_loss(student, teacher, mask, counts)
            if settings.attention:
                loss = loss + settings.attention * self._attention_loss(student, teacher, mask, counts)
            if settings.relation:
                loss = loss + settings.relation * self._relation_loss(student, teacher, mask, counts)
        return loss if isinstance(loss, Tensor) else outputs.sum() * 0.0

    def _output_loss(self, outputs: Tensor, target: Any, batch: dict[str, Any], counts: dict[str, float]) -> Tensor:
        settings = self.settings
        assert settings.temperature is not None and settings.objective is not None
        if self.kind == "embedding":
            rows = counts["rows"] * outputs.shape[0] / len(batch["example_index"])
            if settings.objective == "cosine":
                return losses.embedding_cosine(outputs, target, count=rows)
            if settings.objective == "mse":
                return losses.regression(outputs, target, count=rows)
            return losses.similarity(outputs, target, temperature=settings.temperature, count=rows)
        if self.kind == "text-regression":
            return losses.regression(
                outputs.reshape(outputs.shape[0], -1),
                target.reshape(target.shape[0], -1),
                count=counts["rows"],
            )
        mask, count = None, counts["rows"]
        if self.kind in TOKEN_KINDS:
            mask, count = counted_labels(batch["labels"], self.kind), counts["labels"]
            if self.kind == "causal-lm":
                outputs = outputs[:, :-1]
                target = tuple(t[:, :-1] for t in target) if isinstance(target, tuple) else target[:, :-1]
        if isinstance(target, tuple):
            if settings.objective != "kl":
                raise LeanError("Stored top-k logits serve objective 'kl' only; keep the teacher live for others.")
            return losses.top_k_logits(outputs, *target, mask=mask, temperature=settings.temperature, count=count)
        return losses.logits(
            outputs,
            target,
            mask=mask,
            temperature=settings.temperature,
            objective=settings.objective,
            count=count,
        )

    def _hidden_loss(self, student: Record, teacher: Record, mask: Tensor, counts: dict[str, float]) -> Tensor:
        pairs = [(layer + 1, match + 1) for layer, match in enumerate(self.layers)]
        if self.settings.match_embeddings:
            pairs.insert(0, (0, 0))
        project = self.projection if self.projection is not None else nn.Identity()
        terms = [
            losses.hidden_states(project(student.hidden[s]), teacher.hidden[t], mask=mask, count=counts["tokens"])
            for s, t in pairs
        ]
        return torch.stack(terms).sum()

    def _attention_loss(self, student: Record, teacher: Record, mask: Tensor, counts: dict[str, float]) -> Tensor:
        terms = [
            losses.attention_scores(
                student.attention[layer].scores(),
                teacher.attention[match].scores(),
                mask=mask,
                causal=self.causal,
                count=counts["pairs"],
            )
            for layer, match in enumerate(self.layers)
        ]
        return torch.stack(terms).sum()

    def _relation_loss(self, student: Record, teacher: Record, mask: Tensor, counts: dict[str, float]) -> Tensor:
        chosen = self.settings.relation_layer
        ours, theirs = student.attention[-1], teacher.attention[-1 if chosen is None else chosen]
        heads = self.settings.relation_heads or theirs.query.shape[1]
        terms = [
            losses.relation(
                ours.joined(name),
                theirs.joined(name),
                heads=heads,
                mask=mask,
                causal=self.causal,
                count=counts["tokens"],
            )
            for name in ("query", "key", "value")
        ]
        return torch.stack(terms).sum()
