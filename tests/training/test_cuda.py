"""The same path on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from leanformers.errors import LeanError
from leanformers.training import Distillation, Teacher, TrainingDiverged, fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("inner", [False, True])
def test_a_step_is_the_cpus(
    inner: bool, bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any
) -> None:
    task = sentiment()
    settings = Distillation(alpha=0.5, hidden=float(inner), relation=float(inner), attention=float(inner))
    losses = []
    for device in ("cpu", "cuda"):
        teacher = Teacher(bert(seed=4).to(device), task, tokenizer)
        model = bert().to(device)
        result = fit(model, task, tokenizer, dropout=0.0, teacher=teacher, distillation=settings, progress=False)
        assert next(model.parameters()).device.type == device
        losses.append(result.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_bfloat16_learns_and_keeps_float32_weights(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any
) -> None:
    task, model = sentiment(200), bert().cuda()
    fit(model, task, tokenizer, epochs=15, learning_rate=5e-3, batch_size=16, bf16=True, progress=False)
    metrics = task.evaluate(lambda b: task.forward(model, b), tokenizer, "test")
    assert metrics["accuracy"] > 0.9
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_language_models_learn_from_a_live_and_a_stored_teacher(
    llama: Callable[..., Any], language: Callable[..., Any], tokenizer: Any
) -> None:
    task, model = language(), llama().cuda()
    for top_k in (None, 8):
        student = copy.deepcopy(model)
        teacher = Teacher(copy.deepcopy(model), task, tokenizer, top_k=top_k)
        result = fit(
            student,
            task,
            tokenizer,
            teacher=teacher,
            distillation=Distillation(alpha=1.0),
            bf16=True,
            progress=False,
        )
        assert result.loss < 1e-2


def test_divergence_is_seen(bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any) -> None:
    with pytest.raises(TrainingDiverged):
        fit(
            bert().cuda(),
            sentiment(),
            tokenizer,
            epochs=9,
            learning_rate=1e30,
            warmup=0.0,
            progress=False,
        )


def test_a_live_teacher_stands_beside_its_student(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any
) -> None:
    task = sentiment()
    stored = Teacher(bert(seed=4), task, tokenizer)
    assert fit(bert().cuda(), task, tokenizer, teacher=stored, progress=False).steps == 3
    with pytest.raises(LeanError, match="cuda"):
        fit(
            bert().cuda(),
            task,
            tokenizer,
            teacher=stored,
            distillation=Distillation(hidden=1.0),
            progress=False,
        )
