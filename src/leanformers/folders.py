"""Folders that are written whole or not at all, and a full disk said in one sentence."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leanformers.errors import LeanError

# How libraries that hide the system's error code speak of a full disk (safetensors, sqlite, torch.save).
_FULL = (
    "No space left on device",
    "os error 28",
    "os error 122",
    "disk is full",
    "Disk quota exceeded",
    "PytorchStreamWriter failed",
    "inline_container",
)


def disk_full(error: BaseException) -> bool:
    """Whether the error, or what caused it, is that the disk is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(seen) for words in _FULL):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def guarding_disk(folder: Path) -> Iterator[None]:
    """Turn a full disk into a LeanError that names the folder and the remedy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFull) or not disk_full(error):
            raise
        raise DiskFull(
            f"the disk that holds {folder} is full: free some space and run the same command again, which "
            "goes on from what is there, or choose another folder with out= (--out)"
        ) from error


class DiskFull(LeanError):
    """No space left; nothing half-written stays behind."""


def partial_of(target: Path) -> Path:
    """Where `target` is written before it is renamed."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def whole(target: Path, *, keep: bool = False) -> Iterator[Path]:
    """A folder beside `target` that takes its place once the block ends without error.

    A reader sees the old folder or the new one, never a half. keep: go on from what an earlier attempt left
    there, and leave it for a later one if the block fails for another reason than a full disk; without a folder in it
    (of a training) there is nothing to go on from.
    """
    partial = partial_of(target)
    if not keep:
        shutil.rmtree(partial, ignore_errors=True)
    with guarding_disk(target):
        try:
            partial.mkdir(parents=True, exist_ok=True)
            yield partial
            replace(partial, target)
        except BaseException as error:
            begun = partial.is_dir() and any(entry.is_dir() for entry in partial.iterdir())
            if not (keep and begun) or disk_full(error):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def replace(source: Path, target: Path) -> None:
    """Rename a folder onto another, whose old content goes."""
    _let_read(source)
    if not target.exists():
        source.rename(target)
        return
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _let_read(folder: Path) -> None:
    """Give files that only their owner may read, as safetensors writes them, the mode of any other new file."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600:
            path.chmod(0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: a reader sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with guarding_disk(path.parent):
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON in one step, numbers that JSON cannot hold as null."""
    write_text(path, json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    return data if isinstance(data, str | int | float | bool | None) else str(data)


def check_output(folder: Path, ours: Callable[[Path], bool], what: str) -> None:
    """Refuse an output folder that holds something else.

    Raises:
        LeanError: it is a file, or a folder with content that is not `what`.
    """
    if folder.is_symlink() and not folder.exists():
        raise LeanError(f"{folder} is a link that leads nowhere: choose another --out")
    if folder.exists() and not folder.is_dir():
        raise LeanError(f"{folder} is a file, and {what} is a folder: choose another --out")
    if folder.is_dir() and any(folder.iterdir()) and not ours(folder):
        raise LeanError(f"{folder} exists and is not {what}: choose another --out, or remove it")
    above = folder
    while not above.exists():
        above = above.parent
    if not os.access(above, os.W_OK):
        raise LeanError(f"{above} may not be written by you: choose another --out")
