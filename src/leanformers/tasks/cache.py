"""The folder for what is downloaded or converted once: $LEANFORMERS_CACHE, or ~/.cache/leanformers."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import LeanError
from ..folders import DiskFull, disk_full


def cache_dir() -> Path:
    """The cache folder, made if need be.

    Raises:
        LeanError: it cannot be made.
    """
    folder = Path(os.environ.get("LEANFORMERS_CACHE") or Path.home() / ".cache" / "leanformers")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LeanError(
            f"The cache folder {folder} cannot be made ({error.strerror}); set LEANFORMERS_CACHE to another folder."
        ) from error
    return folder


@contextmanager
def finished(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` once the block ends without error.

    A reader therefore never sees a half-written folder, and of two processes that make the same one the
    first wins.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    except Exception as error:
        if not disk_full(error):
            raise
        raise DiskFull(
            f"the disk that holds {target.parent} is full: free some space, or set LEANFORMERS_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' warnings and progress bars off, for what is checked here; then as they were."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
