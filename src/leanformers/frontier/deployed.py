"""A point of a run in another runtime: NAME@RUNTIME, an export that was proved once and lies in `exports/`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from leanformers import folders
from leanformers.errors import LeanError


def named(name: str, runtime: str) -> str:
    """What a point is called in a runtime other than the search's own, and its export in any."""
    return f"{name}@{runtime}"


def source_of(name: str) -> str:
    """The point that was exported; a point that is none in another runtime is its own."""
    return name.partition("@")[0]


def is_deployed(name: str) -> bool:
    """Whether it is a point in another runtime."""
    return source_of(name) != name


def exported(folder: Path, key: str) -> Path:
    """Where the export of name@runtime lies."""
    return folder / "exports" / key


def export_of(folder: Path, name: str, runtime: str) -> Path | None:
    """The export that a point's figures in a runtime are of; None for a runtime that takes models as they are."""
    from leanformers.deploy import DEPLOYED

    return exported(folder, named(name, runtime)) if runtime in DEPLOYED else None


def not_exported(folder: Path) -> dict[str, str]:
    """name@runtime -> why it could not be exported, of a run."""
    failed = sorted((folder / "exports").glob("*.failed.json"))
    return {path.name.removesuffix(".failed.json"): json.loads(path.read_text())["reason"] for path in failed}


def bounded(runtime: str) -> bool:
    """Whether the runtime can be told what share of the quality its number format may cost."""
    from leanformers.deploy import DEPLOYED, target

    to, quantize = DEPLOYED.get(runtime, ("", None))
    return quantize is not None and target(to).within is not None


def opened(
    folder: Path, name: str, runtime: str, source: tuple[Any, Any], task: Any, max_drop: float | None = None
) -> Any:
    """A Prepared of a model in another runtime, exported and proved the first time.

    Args:
        source: the model and its tokenizer.
        max_drop: of quality, as a share, that int8 may cost where the runtime can bound it; None for any.

    Raises:
        LeanError: it cannot be exported, or does not answer as its source.
    """
    from leanformers.deploy import DEPLOYED, export, target

    place = exported(folder, named(name, runtime))
    to, quantize = DEPLOYED[runtime]
    bound = max_drop if bounded(runtime) else None
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "locks" / f"export-{place.name}.lock"):
        if not place.is_dir():
            export(source, to, place, task=task, quantize=quantize, max_drop=bound, measure=False)
        return target(to).prepare(place, source[0], task, quantize)


def deployed(
    folder: Path, name: str, runtime: str, source: tuple[Any, Any], task: Any, max_drop: float | None = None
) -> Any:
    """`opened`, or None where that fails; the reason is kept in the run, and it is not tried again."""
    place = exported(folder, named(name, runtime))
    failure = place.with_name(f"{place.name}.failed.json")
    if failure.is_file():
        return None
    try:
        return opened(folder, name, runtime, source, task, max_drop)
    except LeanError as error:
        if folders.disk_full(error):
            raise
        failure.parent.mkdir(parents=True, exist_ok=True)  # it may be refused before anything is written
        folders.write_json(failure, {"reason": str(error)})
        return None


@contextmanager
def passing(folder: Path) -> Iterator[Path]:
    """An empty folder in a run's, for this process alone, gone afterwards, as is what killed processes left there."""
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".draft-*"):
        if (lock := _taken(folder, left.name)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            lock.release()
    name, lock = next((n, lock) for n in map(".draft-{}".format, count()) if (lock := _taken(folder, n)) is not None)
    place = folder / name
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        lock.release()


def _taken(folder: Path, name: str) -> FileLock | None:
    """The lock of that name in a run, if nobody holds it."""
    lock = FileLock(folder / "locks" / f"{name.lstrip('.')}.lock")
    try:
        return lock.acquire(timeout=0).lock
    except Timeout:
        return None
