"""A model, however it was given, with all that measuring it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanformers.errors import LeanError
from leanformers.runtimes import Prepared, prepare


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with all that measuring it takes; `folder` is its checkpoint, if it has one."""

    model: Any
    tokenizer: Any
    folder: Path | None
    prepared: Prepared | None

    @property
    def ready(self) -> Prepared:
        """What is run; there is one whenever there is a task."""
        if self.prepared is None:
            raise LeanError("A model is only run with a task: give one.")
        return self.prepared


def subject_of(source: Any, task: Any, runtime: str, folder: str | Path | None) -> Subject:
    place = Path(folder) if folder is not None else None
    model, tokenizer = source if isinstance(source, tuple) else (source, None)
    if isinstance(model, str | Path):
        from leanformers.tasks import load
        from leanformers.tasks.loading import warn_of_new_head

        place, name = place or _folder_of(model), model
        model, found = load(model, task, "auto")  # as it is stored: that is what is measured
        warn_of_new_head(model, name)
        tokenizer = tokenizer or found
    prepared = model if isinstance(model, Prepared) else None
    model = prepared.source if prepared is not None else model
    if tokenizer is None and task is not None:
        tokenizer = _tokenizer(model, task)
    if prepared is None and task is not None:
        prepared = prepare(model, task, runtime)
    return Subject(model=model, tokenizer=tokenizer, folder=place, prepared=prepared)


def _tokenizer(model: Any, task: Any) -> Any:
    from leanformers.tasks import load

    return load(model, task)[1]


def _folder_of(source: str | Path) -> Path | None:
    """The checkpoint that a folder or a packaged name stands for; None for a name of the hub."""
    from leanformers.tasks.checkpoints import MODELS, checkpoint

    if str(source) in MODELS:
        return Path(checkpoint(str(source)))
    path = Path(source).expanduser()
    return path if path.is_dir() else None
