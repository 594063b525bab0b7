"""Where a search's models run and are measured: in PyTorch as they are, or exported to the runtime that serves them.

What is kept, the baseline and what was run in full, is exported once and proved. An estimate is exported to a passing
folder, unproved: costs are those of the first model of its shape, so that what is exported again is exported for its
quality, and in floats, where that is PyTorch's to rounding, nothing is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanformers import folders
from leanformers.frontier.deployed import exported, named, opened, passing

if TYPE_CHECKING:
    from leanformers.measure import Measurement

Pair = tuple[Any, Any]
"""A model, or a Prepared of one, and its tokenizer."""


class Venue:
    """A runtime of this process, which takes models as they are.

    baseline: as it runs, timed beside every other model; the workbench sets it.
    """

    exports = False

    def __init__(self, folder: Path, task: Any, runtime: str) -> None:
        self.folder, self.task, self.runtime = folder, task, runtime
        self.baseline: Pair | None = None

    def check(self, pair: Pair) -> None:
        """Refuse, by LeanError, a model that cannot run here, before anything is trained."""
        from leanformers.runtimes import prepare

        prepare(pair[0], self.task, self.runtime)

    def forget(self, name: str) -> None:
        """Drop what was made ready of an earlier attempt at this model."""

    def ready(self, name: str, pair: Pair, place: Path, max_drop: float | None = None) -> tuple[Pair, Path]:
        """What is run of a model that is kept, and the folder whose bytes count; `place` is its checkpoint.

        max_drop: share of the quality that a number format may cost, where that can be bounded.
        """
        from leanformers.runtimes import prepare

        return (prepare(pair[0], self.task, self.runtime), pair[1]), place

    def estimate(self, pair: Pair, **options: Any) -> Measurement:
        """Measure a model that is not kept. options: of `leanformers.measure.measure`."""
        from leanformers.measure import measure

        return measure(pair, self.task, runtime=self.runtime, baseline=self.baseline, **options)

    def tier(self, model: Any) -> str:
        """What loads the model, once it is kept."""
        from leanformers.surgery import tier

        return tier(model)


class Exports(Venue):
    """A runtime that runs exported folders."""

    exports = True

    def __init__(self, folder: Path, task: Any, runtime: str) -> None:
        from leanformers.deploy import DEPLOYED

        super().__init__(folder, task, runtime)
        self.to, self.quantize = DEPLOYED[runtime]

    def check(self, pair: Pair) -> None:
        with self._draft(pair):
            pass

    def forget(self, name: str) -> None:
        shutil.rmtree(self._place(name), ignore_errors=True)

    def ready(self, name: str, pair: Pair, place: Path, max_drop: float | None = None) -> tuple[Pair, Path]:
        found = opened(self.folder, name, self.runtime, pair, self.task, max_drop)
        return (found, pair[1]), self._place(name)

    def estimate(self, pair: Pair, **options: Any) -> Measurement:
        from leanformers.measure import Measurement, measure

        path = self.folder / "shapes" / f"{shape_of(*pair, options.get('batch_size'))}.json"
        costs = Measurement.from_json(json.loads(path.read_text())) if path.is_file() else None
        answers = None
        if self.quantize is None:
            answers = measure(pair, self.task, **{**options, "latency": False})
        if answers is None or costs is None:
            with self._draft(pair) as (ready, place):
                wanted = {"latency": costs is None, **options, "quality": answers is None}
                found = measure(ready, self.task, baseline=self.baseline, folder=place, **wanted)
            answers = answers or found
            if costs is None:
                path.parent.mkdir(exist_ok=True)
                folders.write_json(path, found.to_json())
                costs = found
        return replace(
            costs, quality=answers.quality, metrics=answers.metrics, metric=answers.metric, better=answers.better
        )

    def tier(self, model: Any) -> str:
        return "runtime"

    def _place(self, name: str) -> Path:
        return exported(self.folder, named(name, self.runtime))

    @contextmanager
    def _draft(self, pair: Pair) -> Iterator[tuple[Pair, Path]]:
        from leanformers.deploy import draft

        with passing(self.folder) as place:
            yield (draft(*pair, self.task, self.to, place, quantize=self.quantize), pair[1]), place


def venue_of(folder: Path, task: Any, runtime: str) -> Venue:
    """The venue of a runtime."""
    from leanformers.deploy import DEPLOYED

    return Exports(folder, task, runtime) if runtime in DEPLOYED else Venue(folder, task, runtime)


def shape_of(model: Any, tokenizer: Any, batch_size: int | None = None) -> str:
    """Hash (16 hex digits) of what a runtime's time and bytes depend on, the values of the weights left out.

    These are the edits as the ledger tells them, the tensors' names, sizes and types, and the words that decide how
    many tokens a text has.
    """
    from leanformers.surgery import ledger

    told = {
        "edits": [edit.to_json() for edit in ledger(model)],
        "tensors": [(name, *tensor.shape, str(tensor.dtype)) for name, tensor in model.state_dict().items()],
        "words": sorted(tokenizer.get_vocab()) if hasattr(tokenizer, "get_vocab") else None,
        "batch_size": batch_size,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
