"""`task(...)`: a task from whatever names it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import LeanError
from .base import Task
from .build import own
from .packaged import PACKAGED, packaged
from .sources import looks_like_path


def task(source: str | Path | Task, **options: Any) -> Task:
    """A packaged task, or one on the user's own data.

    Args:
        source: a task (returned as it is), a packaged name (`leanformers.tasks.PACKAGED`), a file, a folder
            or the name of a hub dataset.
        options: of the packaged task, or of `leanformers.tasks.build.own` for own data.

    Raises:
        LeanError: unknown name or option, or data that cannot be used.
    """
    if isinstance(source, Task):
        if options:
            raise LeanError(f"The task {source.name} is made already; give {', '.join(options)} when making it.")
        return source
    if not isinstance(source, str | Path):
        raise LeanError(f"A task is a name, a path or a Task, not a {type(source).__name__}.")
    name = str(source)
    if name in PACKAGED:
        made = _call(packaged(name), name, options)
    else:
        if "/" not in name and not looks_like_path(name):
            close = difflib.get_close_matches(name, PACKAGED, 1)
            if close:
                raise LeanError(f"There is no task {name!r}; did you mean {close[0]!r}? ({', '.join(PACKAGED)})")
        made = _call(lambda **o: own(source, **o), name, options, own)
    made.source, made.options = name, {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    return made


def _call(function: Callable[..., Task], name: str, options: dict[str, Any], signature: Any = None) -> Task:
    known = [p.name for p in inspect.signature(signature or function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise LeanError(f"Task {name} has no option {option!r}; it has {', '.join(known)}.")
    return function(**options)
