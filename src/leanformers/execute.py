"""Carrying out the steps of a recipe on a subject, and writing what came of it."""

from __future__ import annotations

import copy
import dataclasses
import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leanformers.errors import LeanError
from leanformers.folders import write_json
from leanformers.methods import build, get
from leanformers.methods.subject import Subject

_log = logging.getLogger(__name__)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def execute(steps: Sequence[Mapping[str, Any]], subject: Subject, *, folder: Path | None = None) -> Subject:
    """Run the steps on the subject, in place. `folder`: where a training that was cut off goes on from.

    Raises:
        LeanError: a method that does not suit, before any work of any step where that can be known.
    """
    built = [(get(step["method"]), build(step)) for step in steps]
    teachable = subject.teacher if subject.teacher is not None else subject.task
    taught = dataclasses.replace(subject, teacher=teachable)
    for info, _ in built:
        if reason := info.missing(taught) or info.unsuitable(task=subject.task):
            raise LeanError(reason)
    for step, (info, _) in zip(steps, built, strict=True):
        info.check(taught, settings_of(step))
        if info.edits:
            break  # what comes after it meets another model
    for place, (step, (info, method)) in enumerate(zip(steps, built, strict=True)):
        if info.stage != "prepare" and _wants_teacher(subject, built[place:]):
            subject.teacher = teacher_of(subject)
        info.check(subject, settings_of(step))
        seed_everything(subject.seed)
        subject.output_dir = folder / f"step-{place}" if folder is not None else None
        _log.info("step %d of %d: %s", place + 1, len(built), step)
        method(subject)
    subject.model.eval()
    return subject


def settings_of(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step's settings, without its method."""
    return {name: value for name, value in step.items() if name != "method"}


def _wants_teacher(subject: Subject, ahead: Sequence[tuple[Any, Any]]) -> bool:
    """Whether a step ahead learns from a teacher and there is none yet."""
    if subject.teacher is not None or subject.task is None:
        return False
    without_loss = getattr(subject.task, "needs_teacher", False)
    return any("teacher" in info.needs or (info.trains and without_loss) for info, _ in ahead)


def teacher_of(subject: Subject, folder: Path | None = None) -> Any:
    """A teacher that is a copy of the subject's model as it is now."""
    from leanformers.training import Teacher

    return Teacher(copy.deepcopy(subject.model).eval(), subject.task, subject.tokenizer, folder=folder)


def apart(model: Any, source: Any) -> Any:
    """The model that was loaded from a source, or a copy of it where it is the caller's own."""
    given = source[0] if isinstance(source, tuple) else source
    return copy.deepcopy(model) if model is given else model


def check_device(device: Any) -> None:
    """Raise a LeanError unless torch can put a model on the device here; None is where the model is."""
    import torch

    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch built without CUDA asserts
        why = str(error).strip().splitlines()[0].rstrip(".")
        raise LeanError(f"the device {str(device)!r} cannot be used here ({why}): take cpu, or leave it out") from None


def task_of(spec: Any) -> Any:
    """The Task that a recipe's field, a name, a path or a Task means; None for None."""
    if spec is None:
        return None
    from leanformers.tasks import task

    if isinstance(spec, Mapping):
        options = dict(spec)
        return task(options.pop("source"), **options)
    return task(spec)


def load_model(
    source: Any,
    task: Any,
    tokenizer: Any = None,
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a loaded model, a pair, a folder or a name; a loaded one may lack its own.

    dtype: of the weights that are loaded here; "auto" is the checkpoint's own. weights: False loads the structure
    alone.
    """
    from leanformers.tasks import load

    if isinstance(source, str | Path):
        model, found = load(source, task, dtype, trust_remote_code=trust_remote_code, weights=weights)
        return (model, found) if tokenizer is None else load((model, tokenizer), task)
    if tokenizer is not None:
        return load((source, tokenizer), task)
    if task is None and not isinstance(source, tuple):
        try:
            return load(source, task)
        except LeanError:
            return source, None
    return load(source, task)


def attach_reference(task: Any, model: Any, tokenizer: Any, *, copy_model: bool = True) -> None:
    """Make this model the reference of a task that compares vectors (an old index, its neighbours).

    copy_model: whether a copy of it is kept, since it will be edited or trained.
    """
    if task is not None and hasattr(task, "attach_teacher"):
        from leanformers.runtimes import prepare

        task.attach_teacher(prepare(copy.deepcopy(model) if copy_model else model, task), tokenizer)


def save_checkpoint(folder: Path, model: Any, tokenizer: Any, task: Any) -> None:
    """Weights, config and tokenizer, and what else the task's checkpoints hold."""
    from leanformers.tasks.cache import quiet

    with quiet():  # progress bars of saving
        model.save_pretrained(folder)
    if task is not None:
        task.save_extras(folder, tokenizer)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_provenance(folder: Path, recipe: Any, notes: Mapping[str, Any] | None = None) -> None:
    """The exact recipe (a Recipe), and the versions and the machine it ran on."""
    from leanformers.measure import environment

    recipe.save(folder / "recipe.yaml")
    write_json(folder / "environment.json", environment())
    if notes:
        write_json(folder / "notes.json", dict(notes))
