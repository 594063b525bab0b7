"""What the evidence scripts share: real models on real tasks, tuned and scored the same way."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from typing import Any

import torch

from leanformers.methods import Subject, build
from leanformers.tasks import load, task


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def subject(source: Any, on: Any, *, seed: int = 0, **options: Any) -> Subject:
    """A model of the packages on a task, ready for methods; the head, where it is new, is drawn from the seed."""
    the_task = task(on) if isinstance(on, str) else on
    torch.manual_seed(seed)
    loaded: Any = load(source, the_task, **options)
    model, tokenizer = loaded
    return Subject(model=model.to(device()).eval(), tokenizer=tokenizer, task=the_task, seed=seed)


def copied(source: Subject, *, seed: int | None = None) -> Subject:
    """The same model again, to be treated in another way."""
    return Subject(
        model=copy.deepcopy(source.model),
        tokenizer=source.tokenizer,
        task=source.task,
        teacher=source.teacher,
        seed=source.seed if seed is None else seed,
    )


def treat(source: Subject, *steps: Mapping[str, Any], seed: int | None = None) -> Subject:
    """A copy of the subject after these steps of a recipe."""
    result = copied(source, seed=seed)
    for step in steps:
        build(step)(result)
    return result


def quality(of: Subject, split: str = "test", limit: int | None = None) -> float:
    """The task's metric as it is (higher or lower is better, as the task says)."""
    return of.evaluate(split, limit)[of.task.metric]


def perplexity(of: Subject, limit: int | None = None, split: str = "test") -> float:
    return of.evaluate(split, limit)["perplexity"]


def mean(values: Any) -> float:
    return statistics.fmean(values)
