"""One line of progress, by rich, on standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def bar(progress: Any, label: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Give `advance(steps=1, note="")`.

    progress: False for nothing, True for a line of its own that vanishes at the end, or a running
    `rich.progress.Progress`, which gets one more line for the time being.
    """
    if not progress or total <= done:
        yield lambda steps=1, note="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with contextlib.ExitStack() as stack:
        if progress is True:
            console = Console(stderr=True)
            progress = stack.enter_context(
                Progress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeRemainingColumn(),
                    console=console,
                    transient=True,
                    disable=not console.is_terminal,  # rich would leave empty lines in a log
                )
            )
        line = progress.add_task(label, total=total, completed=done)
        stack.callback(progress.remove_task, line)

        def advance(steps: int = 1, note: str = "") -> None:
            progress.update(line, advance=steps, description=f"{label} {note}".rstrip())

        yield advance
