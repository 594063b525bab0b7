"""A student and its teacher brought together, or refused: tasks, labels, tokenizers, layers, devices."""

from __future__ import annotations

from typing import Any

import torch

from leanformers.errors import LeanError
from leanformers.training.callbacks import Penalty
from leanformers.training.capture import plain
from leanformers.training.distillation import TOKEN_KINDS, Distillation, DistillationLoss
from leanformers.training.objective import Objective
from leanformers.training.teacher import Teacher


def pair(
    model: Any,
    task: Any,
    tokenizer: Any,
    distillation: Distillation | None,
    teacher: Teacher | None,
    *,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    penalty: Penalty | None = None,
) -> Objective:
    """What is trained: the model with its labels alone, or with its teacher.

    Raises:
        LeanError: the teacher is the student, of another task, with other labels or too small a vocabulary,
            or stores what these settings cannot use.
    """
    if distillation is None or teacher is None:
        return Objective(model, task, penalty=penalty)
    distillation = distillation.resolved(task.kind)
    _check(model, task, teacher)
    by_token = task.kind in TOKEN_KINDS or distillation.inner
    token_map = teacher.token_map(tokenizer) if by_token else None
    if teacher.top_k is not None and token_map is not None:
        raise LeanError(
            "Stored top-k logits are over the teacher's whole vocabulary; for a student with a cut "
            "vocabulary make the Teacher without top_k, so that it runs live."
        )
    if teacher.top_k is not None and distillation.inner:
        raise LeanError("Hidden states and attention need a live teacher; make the Teacher without top_k.")
    device = next(model.parameters()).device
    if distillation.inner or not teacher.stored:
        there = next(teacher.model.parameters()).device
        if there != device:
            raise LeanError(f"The student is on {device} and its live teacher on {there}; move teacher.model there.")
    if distillation.inner:
        from leanformers.anatomy import Anatomy

        ours, theirs = Anatomy.of(plain(model)), Anatomy.of(plain(teacher.model))
        gone = [layer.path for one in (ours, theirs) for layer in one.layers if layer.attention.absent]
        if gone and (distillation.attention or distillation.relation_layer is not None):
            raise LeanError(
                f"The attention of {gone[0]} was dropped, so attention is not matched layer by layer: "
                "set attention to 0 and leave out relation_layer."
            )
        torch.manual_seed(seed)  # of the learned projection
        loss = DistillationLoss(
            distillation,
            task.kind,
            causal=ours.layers[-1].attention.causal,
            widths=(ours.hidden_size, theirs.hidden_size),
            depths=(len(ours.layers), len(theirs.layers)),
        ).to(device)
    else:
        loss = DistillationLoss(distillation, task.kind)
    return Objective(
        model,
        task,
        distillation=loss,
        teacher=teacher,
        token_map=token_map,
        split=split,
        limit=limit,
        penalty=penalty,
    )


def _check(model: Any, task: Any, teacher: Teacher) -> None:
    if teacher.model is model:
        raise LeanError("The teacher is the model that is trained; give Teacher a copy.deepcopy of it.")
    if teacher.task is not task and teacher.task.fingerprint != task.fingerprint:
        raise LeanError(
            f"The teacher is of the task {teacher.task.name}, not of {task.name}; make a Teacher with this task."
        )
    if task.kind == "text-classification":
        ours, theirs = _labels(model), _labels(teacher.model)
        if ours and theirs and ours != theirs:
            raise LeanError(
                f"The student's labels are {ours} and the teacher's {theirs}; both must name the same "
                "labels in the same order (config.id2label)."
            )


def _labels(model: Any) -> list[str]:
    """The names of the classes in order; empty where nobody named them."""
    names = getattr(model.config, "id2label", None) or {}
    found = [str(names[index]) for index in sorted(names)]
    return [] if all(name.startswith("LABEL_") for name in found) else found
