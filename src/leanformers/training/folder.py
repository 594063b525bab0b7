"""The folder of one training: what is trained there, its checkpoints, and going on from them.

training.json          the arguments, the task, the model and the teacher, so that no other training mixes in
checkpoint-<step>/     learned.safetensors, Trainer's state, and `complete`, written last
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from leanformers.errors import LeanError
from leanformers.training.objective import Objective

LEARNED = "learned.safetensors"
COMPLETE = "complete"
# Needed to go on, not to load a finished training.
_TRANSIENT = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")


def opened(output_dir: str | os.PathLike[str] | None, stack: contextlib.ExitStack) -> Path:
    """The folder, made if need be; without a name, one that vanishes with the stack."""
    if output_dir is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="leanformers-")))
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LeanError(f"The training folder {folder} cannot be made ({error}); name another output_dir.") from error
    return folder


def identify(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what is trained here.

    Raises:
        LeanError: something else was, or the folder cannot be written.
    """
    settings = json.loads(json.dumps(settings))
    path = folder / "training.json"
    before = None
    with contextlib.suppress(FileNotFoundError, ValueError):  # a kill while it was written: nothing was trained
        before = json.loads(path.read_text())
    if before is None:
        try:
            path.write_text(json.dumps(settings, indent=1) + "\n")
        except OSError as error:
            raise LeanError(f"{path} cannot be written ({error}); free some space or name another folder.") from error
        return
    differing = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
    if differing:
        raise LeanError(
            f"The folder {folder} holds another training (its {', '.join(differing)} differ); delete it or "
            "name another output_dir."
        )


def newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; what a kill left unfinished is removed."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).is_file():
            found.append((int(path.name.rpartition("-")[2]), path))
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(found)[1] if found else None


def restore(objective: Objective, checkpoint: Path) -> None:
    """Put a checkpoint's tensors into the model.

    Raises:
        LeanError: they cannot be read or are another model's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(checkpoint / LEARNED)
    except (OSError, SafetensorError) as error:
        raise LeanError(f"The training checkpoint {checkpoint} cannot be read ({error}); delete its folder.") from error
    if not objective.restore(tensors):
        raise LeanError(f"The training checkpoint {checkpoint} is of another model; delete it or name another folder.")


def finish(folder: Path) -> None:
    """A finished training keeps its weights only."""
    for name in _TRANSIENT:
        for path in folder.glob(f"checkpoint-*/{name}"):
            path.unlink(missing_ok=True)
