"""The course of a search: estimate many recipes, train the promising ones in full, compare what is left.

It can be killed at any moment: estimates are in the store, trained models in `finals`, a training goes on
from its last checkpoint. The same call again goes on, and several processes may work in one folder.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from leanformers import folders
from leanformers.frontier.bench import RESULT, Bench, Result
from leanformers.frontier.clock import LAST, Clock
from leanformers.frontier.goals import Goal
from leanformers.frontier.pareto import spread
from leanformers.frontier.propose import propose
from leanformers.frontier.select import (
    KEPT,
    Candidate,
    best_of_aims,
    next_to_train,
    reference_of,
    regained,
    vector,
)
from leanformers.frontier.space import Space, Steps, name_of, trained_prefix
from leanformers.frontier.store import Record, Store
from leanformers.recipe import key_of

_log = logging.getLogger(__name__)
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much a search may do.

    trials: recipes that are estimated. finalists: trainings in full. points: checkpoints that are kept at
    most.
    minutes: of wall-clock time for this call, None for no limit; the step under way is always ended.
    """

    trials: int = 20
    finalists: int = 3
    points: int = 8
    minutes: float | None = None


class Search:
    """One process's part in the search of a run folder."""

    def __init__(
        self,
        folder: Path,
        bench: Bench,
        space: Space,
        goals: Sequence[Goal],
        objectives: Sequence[str],
        effort: Effort,
        *,
        seed: int = 0,
        say: Say = _log.info,
    ) -> None:
        self.folder, self.bench, self.space = folder, bench, space
        self.goals, self.objectives, self.effort, self.say = tuple(goals), tuple(objectives), effort, say
        self.finals = folder / "finals"
        self.finals.mkdir(parents=True, exist_ok=True)
        self.store = Store(folder, space, objectives, seed)
        self.clock, self.last = Clock(minutes=effort.minutes), LAST  # the time, and what of it is for the end

    @property
    def seconds_left(self) -> float | None:
        """Until the end of the time that was given, a share aside for the last measurement."""
        return self.clock.left(1 - self.last)

    # -- estimates -----------------------------------------------------------------------------------------
    def starts(self) -> list[Steps]:
        """The recipes that are estimated first, whatever the seed."""
        return self.space.starts()[: max(5, self.effort.trials // 3)]

    def explore(self) -> None:
        """Estimate recipes until enough were tried, at most two fifths of the time that is left."""
        self.store.enqueue(self.starts())
        left = self.seconds_left
        until = None if left is None else self.clock.now() + 0.4 * left
        while until is None or self.clock.now() < until:
            taken = self.store.next(self.effort.trials, self._propose)
            if taken is None:
                if not self.store.others_running():
                    break
                time.sleep(0.2)
                continue
            self._estimate(*taken)

    def _propose(self, records: list[Record], seen: set[str]) -> Steps | None:
        """The recipe that promises most, with training's gain added to the estimates."""
        candidates = self.candidates(records)
        share = regained(candidates)
        tried = [(c.steps, vector(c, self.objectives, share)) for c in candidates]
        corner = reference_of(self.goals, self.objectives)
        return propose(self.space, tried, corner, seen, self.store.seed + len(records))

    def _estimate(self, number: int, steps: Steps) -> None:
        label = describe(steps)
        try:
            result = self.bench.estimate(steps)
            values = [result.ratios.get(name, 1.0) for name in self.objectives]
            if not all(map(math.isfinite, values)):
                raise FloatingPointError(f"it cannot be compared with the baseline ({told(result, self.objectives)})")
        except KeyboardInterrupt:
            self.store.cut_off(number)
            raise
        except Exception as error:
            if folders.disk_full(error):
                self.store.cut_off(number)
                raise
            _log.debug("trial %d", number, exc_info=True)
            self.store.failed(number, why(error))
            self.say(f"{label}: failed, {why(error)}")
            return
        self.store.done(number, values, result.to_json())
        self.say(f"{label}: {told(result, self.objectives)} estimated in {result.seconds:.0f} s")

    # -- full trainings ------------------------------------------------------------------------------------
    def confirm(self) -> None:
        """Train the promising in full, one by one, learning from each; then finish what costs no training."""
        while True:
            candidates = self.candidates()
            begun = {self._prefix(steps) for steps in self._tried()}
            begun |= {self._prefix(c.steps) for c in candidates if c.in_hand}
            left = self.seconds_left
            if left is not None and left <= 0:
                break
            chosen = None
            if len(begun - {""}) < self.effort.finalists:
                chosen = next_to_train(candidates, self.goals, self.objectives, seconds_left=left)
            if chosen is not None:
                self._full(chosen.steps)
            elif not self._wait(candidates):
                break
        self._finish()

    def _finish(self) -> None:
        """Save those of the best that need no further training."""
        corner = reference_of(self.goals, self.objectives, KEPT)
        for _ in range(3):  # a failure makes room for another
            candidates = self.candidates()
            share = regained(candidates)
            free = [c for c in candidates if c.known or (not c.failed and self._begun(c.steps))]
            vectors = [vector(c, self.objectives, share) for c in free]
            chosen = [free[i] for i in spread(vectors, self.effort.points, corner)]
            chosen += [c for c in best_of_aims(free, self.goals, share) if c not in chosen]
            missing = [c for c in chosen if self.saved(c.steps) is None]
            if not missing:
                break
            for candidate in missing:
                if self.clock.up(1 - self.last) and self.all_saved():
                    return  # with what there is
                self._full(candidate.steps)

    def _full(self, steps: Steps) -> None:
        name, label = name_of(steps, key_of(steps)), describe(steps)
        try:
            result = self.bench.full(steps)
        except Exception as error:
            if folders.disk_full(error):
                raise
            _log.debug("training of %s", name, exc_info=True)
            shutil.rmtree(folders.partial_of(self.finals / name), ignore_errors=True)
            folders.write_json(self.finals / f"{name}.failed.json", {"steps": steps, "reason": why(error)})
            self.say(f"{label}: failed, {why(error)}")
            return
        self.say(f"{label}: {told(result, self.objectives)} in full in {result.seconds:.0f} s")

    def _wait(self, candidates: Sequence[Candidate]) -> bool:
        """Wait while another process trains; False if none does."""
        for candidate in candidates:
            if candidate.in_hand:
                with FileLock(self._lock(candidate.steps)):
                    pass
                time.sleep(0.1)
                return True
        return False

    # -- what is known -------------------------------------------------------------------------------------
    def candidates(self, records: Sequence[Record] | None = None) -> list[Candidate]:
        """All recipes that were estimated, in the order of their trials, with what is known of them."""
        found = []
        for record in self.store.records() if records is None else records:
            if record.state != "done" or record.result is None:
                continue
            result, steps, saved = Result(**record.result), record.steps, self.saved(record.steps)
            found.append(
                Candidate(
                    key=record.key,
                    steps=steps,
                    quality=result.ratios.get("quality", 0.0),
                    ratios=result.ratios,
                    measurement=result.measurement,
                    trains=trained_prefix(self.space.infos, steps) > 0,
                    full=saved.ratios.get("quality") if saved else None,
                    in_hand=saved is None and self._held(steps),
                    failed=self.failure(steps) is not None,
                    seconds=0.0 if self._begun(steps) else result.full_seconds,
                )
            )
        return found

    def saved(self, steps: Steps) -> Result | None:
        """The result of a recipe that was run in full."""
        path = self.finals / name_of(steps, key_of(steps)) / RESULT
        return Result(**json.loads(path.read_text())) if path.is_file() else None

    def failure(self, steps: Steps) -> str | None:
        """Why a recipe failed when it was run in full."""
        path = self.finals / f"{name_of(steps, key_of(steps))}.failed.json"
        return str(json.loads(path.read_text())["reason"]) if path.is_file() else None

    def all_saved(self) -> dict[str, Steps]:
        """All recipes that were run in full: name -> steps."""
        return {p.parent.name: json.loads(p.read_text()) for p in sorted(self.finals.glob("*/steps.json"))}

    def _tried(self) -> list[Steps]:
        failed = [json.loads(p.read_text())["steps"] for p in self.finals.glob("*.failed.json")]
        return [*self.all_saved().values(), *failed]

    def _prefix(self, steps: Steps) -> str:
        count = trained_prefix(self.space.infos, steps)
        return key_of(steps[:count]) if count else ""

    def _begun(self, steps: Steps) -> bool:
        """Whether the part of the recipe that trains was run in full, be it for another recipe."""
        count = trained_prefix(self.space.infos, steps)
        return count > 0 and self.saved(steps[:count]) is not None

    def _lock(self, steps: Steps) -> Path:
        return self.folder / "locks" / f"final-{name_of(steps, key_of(steps))}.lock"

    def _held(self, steps: Steps) -> bool:
        """Whether another process runs the recipe, or the part of it that trains."""
        count = trained_prefix(self.space.infos, steps)
        for part in (steps, steps[:count]):
            if part and self._lock(part).exists():
                try:
                    with FileLock(self._lock(part)).acquire(timeout=0):
                        pass
                except Timeout:
                    return True
        return False


def describe(steps: Steps) -> str:
    """A recipe in one line: methods with their settings."""
    parts = []
    for step in steps:
        settings = ", ".join(f"{name} {value}" for name, value in step.items() if name != "method")
        parts.append(f"{step['method']} ({settings})" if settings else str(step["method"]))
    return " + ".join(parts)


def told(result: Result, objectives: Sequence[str]) -> str:
    return ", ".join(f"{name} {result.ratios[name]:.3g}x" for name in objectives if name in result.ratios)


def why(error: BaseException) -> str:
    """Why a recipe failed, in one sentence."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate" in text:
        return f"not enough memory ({text[:200]})" if text else "not enough memory"
    if isinstance(error, FloatingPointError):
        return text or "numbers became NaN"
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{text[:300]}" or type(error).__name__
