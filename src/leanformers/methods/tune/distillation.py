"""Distillation: train the model, as edited so far, on its teacher's outputs.

Source: Hinton, Vinyals, Dean (2015, arXiv 1503.02531) for logits; TinyBERT (Jiao et al., 2020, arXiv 1909.10351)
for hidden states and attention; MiniLMv2 (Wang et al., 2021, arXiv 2012.15828) for relations. The losses are
``leanformers.training``'s; this file holds the decisions. The teacher is the model as it was before the recipe; its
outputs are computed once. After dropping layers, hidden states are matched to the kept layers' own indices. With
``augment`` it also answers altered copies of the texts (Tang et al., 2019, arXiv 1903.12136), which small students
need where there are few texts. ``soup`` averages students of several seeds (Wortsman et al., 2022, arXiv 2203.05482).
Cost: training is a forward and a backward pass of the student, plus the teacher's forward once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from leanformers.anatomy import Anatomy
from leanformers.methods.base import Choice, Range, Subject, method, setting
from leanformers.surgery import DropLayers, ledger


@method("distillation", stage="recover", trains=True, needs=("teacher", "text"), paper="Hinton et al. (2015)")
@dataclass(frozen=True, kw_only=True)
class DistillationMethod:
    """Regain quality by learning the teacher's outputs, and its hidden states where asked."""

    epochs: float = setting(2.0, low=0.0, help="passes over the training data")
    learning_rate: float = setting(2e-4, low=0.0, help="peak of the linear schedule")
    temperature: float | None = setting(None, help="of the softmax; by default 2 for classes, 1 for language models")
    alpha: float | None = setting(None, low=0.0, high=1.0, help="share of the teacher's outputs in the loss")
    hidden: float = setting(0.0, low=0.0, help="weight of the hidden states' squared error")
    relation: float = setting(0.0, low=0.0, help="weight of MiniLMv2's relations")
    batch_size: int = setting(32, low=1, help="examples per step")
    limit: int | None = setting(None, low=1, help="training examples used at most")
    augment: int = setting(0, low=0, help="altered copies of each text, learned from the teacher alone")
    soup: int = setting(1, low=1, help="trainings from the same start, each with a seed of its own, averaged")

    def __call__(self, subject: Subject) -> None:
        from leanformers.training import Distillation

        settings = Distillation(
            temperature=self.temperature,
            alpha=1.0 if self.augment and self.alpha is None else self.alpha,
            hidden=self.hidden,
            relation=self.relation,
            layer_map=kept_layers(subject) if self.hidden else None,
        )
        subject.train(
            self.epochs,
            self.learning_rate,
            distillation=settings,
            batch_size=self.batch_size,
            limit=self.limit,
            augment=self.augment,
            soup=self.soup,
        )

    def refuses(self, anatomy: Anatomy, task: Any) -> str | None:
        if getattr(task, "objective", "teacher") == "pairs":
            return "the task learns from its pairs (objective 'pairs'): make it with objective 'teacher', or fine-tune"
        if self.augment and task is not None:
            from leanformers.tasks.augment import unsuitable

            return unsuitable(task)
        return None

    @classmethod
    def space(cls) -> dict[str, Choice | Range]:
        return {"hidden": Choice((0.0, 1.0))}

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return [{}]


def kept_layers(subject: Subject) -> tuple[int, ...] | None:
    """The teacher's layer of each student layer, read off the ledger; None where no layer was dropped.

    Drops that the teacher shares were made before it was taken, and count for nothing.
    """
    edits, shared = ledger(subject.model), ledger(subject.teacher.model) if subject.teacher is not None else ()
    if edits[: len(shared)] == shared:
        edits = edits[len(shared) :]
    kept: list[int] | None = None
    for edit in edits:
        if isinstance(edit, DropLayers):
            kept = list(edit.keep) if kept is None else [kept[index] for index in edit.keep]
    return None if kept is None else tuple(kept)
