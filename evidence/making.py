"""What the evidence of deployment shares: models made by recipes, each once, side by side, in folders.

`make` trains where it is called, a GPU for preference; what it left is measured later, on the CPU that is to serve it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Steps = Sequence[Mapping[str, Any]]


def arguments(doc: str | None, folder: str) -> argparse.Namespace:
    """--folder, --make (train and stop), --workers (trainings side by side) and --only (one recipe, made here)."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--folder", type=Path, default=Path(folder))
    parser.add_argument("--make", action="store_true", help="train, and leave the measuring for later")
    parser.add_argument("--workers", type=int, default=1, help="trainings side by side")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


def made(folder: Path, name: str) -> bool:
    """Whether a recipe's model is there."""
    return (folder / name / "config.json").is_file()


def make(folder: Path, source: Any, task: Any, steps: Steps, name: str) -> None:
    """One recipe's model in folder/name, unless it is there."""
    from common import device
    from leanformers.recipe import Recipe, run

    if not made(folder, name):
        recipe = Recipe(model=str(source), steps=tuple(steps), dtype="float32", seed=0)  # type: ignore[arg-type]
        run(recipe, source, task, out=folder / name, device=device(), measured=False)


def side_by_side(script: str, folder: Path, names: Sequence[str], workers: int) -> None:
    """Make these recipes in processes of their own, through the script's --only."""

    def one(name: str) -> None:
        command = [sys.executable, script, "--folder", str(folder), "--only", name]
        with (folder / f"{name}.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, [name for name in names if not made(folder, name)]))


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The recipe that made a model, as plain data."""
    from leanformers.recipe import Recipe

    return json.loads(json.dumps([dict(step) for step in Recipe.load(folder).steps]))
