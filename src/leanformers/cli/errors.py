"""What the command line says when something is wrong: one sentence and exit code 2, never a traceback."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from leanformers.errors import LeanError

BAD_INPUT = 2
INTERRUPTED = 130


def sentence(error: BaseException) -> str | None:
    """The error as one sentence for its user; None for a fault of the program, which needs its traceback."""
    if isinstance(error, LeanError):
        return _line(str(error))
    from leanformers.folders import disk_full

    if disk_full(error):
        place = getattr(error, "filename", None)
        where = f" that holds {place}" if place else ""
        return f"the disk{where} is full: free some space, or choose another folder with --out"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename} does not exist: check the path"
    if isinstance(error, IsADirectoryError) and error.filename:
        return f"{error.filename} is a folder, and a file is wanted"
    if isinstance(error, NotADirectoryError) and error.filename:
        return f"{error.filename} is a file, and a folder is wanted"
    if isinstance(error, FileExistsError) and error.filename:
        return f"{error.filename} is there already: choose another place"
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename} may not be read or written by you: check its permissions"
    if isinstance(error, UnicodeDecodeError):
        return f"the text is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("leanformers"):
        return f"the package '{error.name.partition('.')[0]}' is not installed: pip install it"
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        return _line(str(error)) or type(error).__name__
    return None


def _line(text: str) -> str:
    """The whole message on one line."""
    return " ".join(text.split())


def complain(message: str) -> None:
    """Write an error to stderr."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), message))


class Commands(TyperGroup):
    """The command group: turns what a user can mend into a sentence, and an interruption into code 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            message = sentence(error)
            if message is None:
                raise
            complain(message)
            raise typer.Exit(getattr(error, "exit_code", BAD_INPUT)) from None
