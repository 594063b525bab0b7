"""A point of a run in another runtime: NAME@RUNTIME, an export that was proved once and lies in `exports/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from leanformers import folders
from leanformers.errors import LeanError


def named(name: str, runtime: str) -> str:
    """What a point is called in a runtime other than the search's own."""
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


def not_exported(folder: Path) -> dict[str, str]:
    """name@runtime -> why it could not be exported, of a run."""
    failed = sorted((folder / "exports").glob("*.failed.json"))
    return {path.name.removesuffix(".failed.json"): json.loads(path.read_text())["reason"] for path in failed}


def deployed(
    folder: Path, name: str, runtime: str, source: tuple[Any, Any], task: Any, max_drop: float | None = None
) -> Any:
    """A Prepared of a model in another runtime, exported and proved once; None where that fails.

    Args:
        source: the model and its tokenizer.
        max_drop: of quality, as a share, that int8 may cost where the runtime can bound it; None for any.
    """
    from leanformers.deploy import DEPLOYED, export, target

    place = exported(folder, named(name, runtime))
    failure = place.with_name(f"{place.name}.failed.json")
    if failure.is_file():
        return None
    to, quantize = DEPLOYED[runtime]
    bound = max_drop if quantize is not None and target(to).within is not None else None
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "locks" / f"export-{place.name}.lock"):
        try:
            if not place.is_dir():
                export(source, to, place, task=task, quantize=quantize, max_drop=bound, measure=False)
            return target(to).prepare(place, source[0], task, quantize)
        except LeanError as error:
            if folders.disk_full(error):
                raise
            folders.write_json(failure, {"reason": str(error)})
            return None
