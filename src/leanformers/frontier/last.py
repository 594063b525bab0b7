"""The last measurement of a search: all that is kept, beside the baseline, in every runtime that was asked for.

Models are loaded together, and timed in the same rounds, as far as memory holds them; where it does not, they come in
groups, each timed in rounds with the baseline, so that ratios are to it all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanformers.frontier.baseline import BASELINE
from leanformers.frontier.clock import LEAST_TEST, fitting
from leanformers.frontier.deployed import deployed, exported, named
from leanformers.frontier.shelf import free, groups

if TYPE_CHECKING:
    from leanformers.frontier.bench import Workbench

_EXPORTING = 0.6  # share of the time that is left then, by which nothing more is exported
_ANSWERING = 0.5  # share of the rest that the answers may take
LATE = "the time was up before it was exported: the same command again goes on with it"


def compare(bench: Workbench, names: Sequence[str]) -> dict[str, Any]:
    """Measurements of the baseline and of these finals, by name, and by name@runtime."""
    from leanformers.training.progress import bar

    clock = bench.clock
    left = clock.left()
    until = None if left is None else clock.now() + _EXPORTING * left
    places = {name: bench.folder / "finals" / name for name in names}
    parts = groups({name: _size(place) for name, place in places.items()}, bench.device) or [[]]
    if len(parts) > 1:
        bench.say(f"last measurement: in {len(parts)} groups, since memory does not hold {1 + len(names)} models")
    count = len(names) + 1
    wanted = count * len(bench.runtimes)
    found: dict[str, Any] = {}
    test = None
    with bar(bench.progress, "Exporting", wanted) as advance:
        for number, part in enumerate(parts):
            models: dict[str, Any] = {}
            folders: dict[str, Path] = {}
            for name in [BASELINE, *part]:
                first = number == 0 or name != BASELINE
                place = bench.folder / BASELINE if name == BASELINE else places[name]
                pair = (bench.model, bench.tokenizer) if name == BASELINE else bench.load(place)
                drop = bench.may_lose(name, bench.venue.runtime, pair)
                models[name], folders[name] = bench.venue.ready(name, pair, place, drop)
                for runtime in bench.runtimes if first else ():
                    advance(1, f"{name} for {runtime}")
                    key = named(name, runtime)
                    if until is not None and clock.now() >= until and not exported(bench.folder, key).is_dir():
                        bench.left_out[key] = LATE
                        continue
                    drop = bench.may_lose(name, runtime, pair)
                    ready = deployed(bench.folder, name, runtime, pair, bench.task, drop)
                    if ready is not None:
                        models[key], folders[key] = (ready, pair[1]), exported(bench.folder, key)
            del pair  # models live in `models` alone, which is emptied below
            ready = None
            if number == 0:  # all are measured on the same rows
                test = _rows(bench, models[BASELINE], count + wanted - len(bench.left_out))
            found |= _measured(bench, models, folders, test, number == 0, len(models) / (count + wanted))
            models.clear()
            free()
    return found


def _measured(
    bench: Workbench, models: dict[str, Any], folders: dict[str, Path], test: int | None, first: bool, share: float
) -> dict[str, Any]:
    from leanformers.measure import compare

    wanted = list(models) if first else list(models)[1:]  # the baseline stands first
    seconds = bench.last_seconds * share
    left = bench.clock.left()
    if left is not None:
        seconds = max(0.2, min(seconds, (1 - _ANSWERING) * left * share))
    return compare(models, bench.task, folders=folders, limit=test, seconds=seconds, wanted=wanted, **bench.timing)


def _rows(bench: Workbench, ready: Any, models: int) -> int | None:
    """Test rows that so many models answer in the time that is left."""
    left = bench.clock.left()
    if left is None:
        return bench.test
    there = len(bench.task.splits["test"])
    each = bench.pace(ready) * models
    rows = fitting(bench.test, there, _ANSWERING * left, each, LEAST_TEST)
    if rows != bench.test:
        bench.say(f"last measurement: {models} models on {rows:,} of {there:,} test rows, which the time is left for")
    return rows


def _size(place: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in place.glob("*.safetensors"))
