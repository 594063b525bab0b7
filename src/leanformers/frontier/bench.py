"""The workbench of a search: it makes the baseline, estimates a recipe, trains one in full, compares all.

This is the only part of a search that touches models; the rest works on what it returns.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from leanformers import folders
from leanformers.errors import LeanError
from leanformers.execute import attach_reference, execute, load_model, save_checkpoint
from leanformers.execute import write_provenance as provenance
from leanformers.frontier import last
from leanformers.frontier.baseline import BASELINE, ROWS, make_baseline
from leanformers.frontier.clock import LEAST, Clock
from leanformers.frontier.deployed import bounded, exported, named
from leanformers.frontier.shelf import Shelf, free
from leanformers.frontier.space import Steps, name_of, trained_prefix
from leanformers.frontier.venue import venue_of
from leanformers.methods import Budget, MethodInfo, Subject
from leanformers.recipe import Recipe, key_of

RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one recipe gave on the validation rows.

    measurement: as `Measurement.to_json`. ratios: to the baseline on the same rows. seconds: of the whole;
    train_seconds: of its training, which saw trained_examples of the full_examples of an uncut training.
    """

    measurement: dict[str, Any]
    ratios: dict[str, float]
    seconds: float
    train_seconds: float = 0.0
    trained_examples: int = 0
    full_examples: int = 0
    tier: str | None = None

    @property
    def full_seconds(self) -> float | None:
        """What the uncut training is predicted to take; None where nothing was trained."""
        if not self.trained_examples:
            return None if self.full_examples else 0.0
        return self.train_seconds * self.full_examples / self.trained_examples

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Bench(Protocol):
    """What a search needs of its workbench; steps are those after the baseline's own."""

    def baseline(self) -> Any: ...
    def estimate(self, steps: Steps) -> Result: ...
    def full(self, steps: Steps) -> Result: ...
    def compare(self, names: Sequence[str]) -> dict[str, Any]: ...


class Workbench:
    """The real one: models, data and measurements, in a run folder.

    budget: what an estimate may train. validation: rows on which recipes are compared while the search goes;
    test: rows of the last measurement, None for all. tune: steps that make the baseline of the loaded model,
    None to fine-tune only where the head is new. runtime: where all is measured; for an exported one, as it is
    served there. runtimes: in which the last measurement also runs every model. clock: of the search, whose limit cuts
    the baseline's training and the rows; say: where that is told.

    In memory there are the baseline, which is the teacher too, the model under work, and what the shelf has room for.
    """

    quick_seconds = 1.5  # of timing, for an estimate
    last_seconds = 10.0  # for the last measurement, all models together

    def __init__(
        self,
        folder: Path,
        model: Any,
        task: Any,
        infos: Mapping[str, MethodInfo],
        *,
        recipe: Recipe,
        tokenizer: Any = None,
        tune: Steps | None = None,
        budget: Budget,
        validation: int | None,
        test: int | None,
        batch_size: int,
        runtime: str,
        device: Any,
        progress: bool,
        runtimes: Sequence[str] = (),
        trust_remote_code: bool = False,
        clock: Clock | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.clock, self.say = clock or Clock(), say
        self.left_out: dict[str, str] = {}  # name@runtime -> why the last measurement is without it
        self.trust, self.runtimes = trust_remote_code, tuple(runtimes)
        self.folder, self.source, self.task, self.infos = folder, model, task, infos
        self.recipe, self.given_tokenizer, self.tune = recipe, tokenizer, tune
        self.budget, self.validation, self.test = budget, validation, test
        self.timing: dict[str, Any] = {"batch_size": batch_size, "seed": recipe.seed}
        self.venue = venue_of(folder, task, runtime)
        self.device, self.progress = device, progress
        self._shelf = Shelf(folder, self.load)
        self.model: Any = None
        self.check: Callable[[Subject], Any] = lambda subject: None  # refuses a model before it is trained
        self.quality_goal: float | None = None  # as a ratio to the baseline: what a number format may not fall below

    # -- the baseline --------------------------------------------------------------------------------------
    def baseline(self) -> Any:
        """Make or load what all others are compared with; returns its Measurement on the test rows."""
        from leanformers.measure import Measurement
        from leanformers.training import Teacher

        place = self.folder / BASELINE
        with FileLock(self.folder / "locks" / "baseline.lock"):  # of two processes one trains, one waits
            if not (place / "measurement.json").is_file():
                make_baseline(self, place)
        free()
        self.recipe = Recipe.load(place)
        # Read back even when just made, so that a run that goes on has the very same model.
        model, self.tokenizer = self.load(place)
        self.model = model.eval()
        attach_reference(self.task, self.model, self.tokenizer, copy_model=False)
        self.teacher = Teacher(self.model, self.task, self.tokenizer, folder=self.folder / "teacher")
        self.venue.baseline, _ = self.venue.ready(BASELINE, (self.model, self.tokenizer), place)
        if (place / ROWS).is_file():
            kept = json.loads((place / ROWS).read_text())
            self.validation = kept["validation"]
            if kept["rounds"] is not None:
                self.timing["rounds"] = kept["rounds"]
        self._reference = Measurement.from_json(json.loads((place / "validation.json").read_text()))
        return Measurement.from_json(json.loads((place / "measurement.json").read_text()))

    def close(self) -> None:
        """Keep no model but the baseline."""
        self._shelf.close()

    def load(self, folder: Path) -> tuple[Any, Any]:
        """A checkpoint of the run, on the device of the search, and its tokenizer."""
        model, tokenizer = load_model(str(folder), self.task, trust_remote_code=self.trust)
        return model.to(self.device), tokenizer

    def pace(self, ready: Any) -> float:
        """Seconds that the answer to one row takes, once what is set up at the first is there."""
        for _ in range(2):
            begun = self.clock.now()
            self.task.evaluate(*ready, "validation", LEAST)
        return (self.clock.now() - begun) / max(1, min(LEAST, len(self.task.splits["validation"])))

    def quick(self) -> dict[str, Any]:
        return {**self.timing, "batches": 4, "seconds": self.quick_seconds}

    def subject_of(self, model: Any, tokenizer: Any, **more: Any) -> Subject:
        return Subject(
            model=model,
            tokenizer=tokenizer,
            task=self.task,
            device=self.device,
            seed=self.recipe.seed,
            progress=self.progress,
            **more,
        )

    @property
    def subject(self) -> Subject:
        """The baseline, its own teacher, as methods look at it."""
        return self.subject_of(self.model, self.tokenizer, teacher=self.teacher)

    def _fresh(self, budget: Budget | None) -> Subject:
        return self.subject_of(
            copy.deepcopy(self.model), copy.deepcopy(self.tokenizer), teacher=self.teacher, budget=budget
        )

    # -- an estimate ---------------------------------------------------------------------------------------
    def estimate(self, steps: Steps) -> Result:
        """The recipe with its training cut to the budget; costs are exact, quality is on part of the rows."""
        start = time.perf_counter()
        try:
            subject = self._after_prefix(steps)
            execute(steps[trained_prefix(self.infos, steps) :], subject)
            return self._measured(subject, start)
        finally:
            free()

    def _after_prefix(self, steps: Steps) -> Subject:
        """The subject after the last step that trains, from the shelf where a recipe began alike."""
        count = trained_prefix(self.infos, steps)
        if count == 0:
            return self._fresh(self.budget)
        self._shelf.make_room(self.model)
        key = key_of(steps[:count])
        kept = self._shelf.take(key)
        return kept or self._shelf.put(key, execute(steps[:count], self._fresh(self.budget)))

    def _measured(self, subject: Subject, start: float, folder: Path | None = None, name: str = "") -> Result:
        """On the validation rows. folder: the checkpoint of a model that is kept under a name."""
        from leanformers.measure import measure

        pair = (subject.model, subject.tokenizer)
        options = {"split": "validation", "limit": self.validation, **self.quick()}
        if folder is None:
            found = self.venue.estimate(pair, **options)
        else:
            self.venue.forget(name)
            drop = self.may_lose(name, self.venue.runtime, pair)
            ready, files = self.venue.ready(name, pair, folder, drop)
            found = measure(ready, self.task, baseline=self.venue.baseline, folder=files, **options)
        if found.quality is None or not math.isfinite(found.quality):
            raise FloatingPointError(f"its quality is not a number ({found.quality})")
        return Result(
            measurement=found.to_json(),
            ratios=found.ratios(self._reference),
            seconds=time.perf_counter() - start,
            train_seconds=subject.trained_seconds,
            trained_examples=subject.trained_examples,
            full_examples=subject.full_examples,
            tier=self.venue.tier(subject.model),
        )

    # -- in full -------------------------------------------------------------------------------------------
    def full(self, steps: Steps) -> Result:
        """Run a recipe uncut and keep its checkpoint; one that begins with a trained one goes on from it."""
        name = name_of(steps, key_of(steps))
        place = self.folder / "finals" / name
        with FileLock(self.folder / "locks" / f"final-{name}.lock"):
            if (place / RESULT).is_file():
                return Result(**json.loads((place / RESULT).read_text()))
            start = time.perf_counter()
            count = trained_prefix(self.infos, steps)
            self._shelf.make_room(self.model)
            if 0 < count < len(steps):
                self.full(steps[:count])
                begun = self.folder / "finals" / name_of(steps[:count], key_of(steps[:count]))
                model, tokenizer = self.load(begun)
                subject = self.subject_of(model, tokenizer, teacher=self.teacher)
            else:
                count, subject = 0, self._fresh(None)
            try:
                with folders.whole(place, keep=True) as partial:
                    execute(steps[count:], subject, folder=partial / "training")
                    save_checkpoint(partial, subject.model, subject.tokenizer, self.task)
                    recipe = replace(self.recipe, steps=(*self.recipe.steps, *steps))
                    provenance(partial, recipe, subject.notes)
                    shutil.rmtree(partial / "training", ignore_errors=True)
                    result = self._measured(subject, start, partial, name)
                    folders.write_json(partial / "steps.json", steps)
                    folders.write_json(partial / RESULT, result.to_json())
                return result
            finally:
                free()

    # -- the last measurement ------------------------------------------------------------------------------
    def compare(self, names: Sequence[str]) -> dict[str, Any]:
        """Measure the baseline and these finals on the test rows, timed interleaved: name -> Measurement.

        Each stands there once more per further runtime, as name@runtime; one that cannot be exported, or for which no
        time is left, is left out.
        """
        self.close()
        return last.compare(self, names)

    def may_lose(self, name: str, runtime: str, pair: tuple[Any, Any]) -> float | None:
        """What share of its quality a model may lose in a runtime that can bound it, where it is not exported yet."""
        from leanformers.runtimes import prepare

        if self.quality_goal is None or not bounded(runtime) or exported(self.folder, named(name, runtime)).is_dir():
            return None
        metrics = self.task.evaluate(prepare(pair[0], self.task), pair[1], "validation", self.validation)
        return may_lose(self.quality_goal, self.task.ratio(self.task.quality(metrics), self._reference.quality))


def may_lose(goal: float, own: float) -> float | None:
    """What share of its quality a model of quality `own` may lose to be at the goal; None where it misses it as it is.

    Both are ratios to the baseline.
    """
    drop = 1 - goal / own if own else 0.0
    return drop if 0 < drop < 1 else None


def check_steps(tune: Any) -> Steps | None:
    """What `tune=` means: "auto" (and None) where it is needed, True and settings always, False never."""
    if tune is None or tune == "auto":
        return None
    if tune is False:
        return []
    step = {"method": "fine-tune"} if tune is True else dict(tune) | {"method": "fine-tune"}
    if not isinstance(tune, bool | Mapping):
        raise LeanError(f"tune is 'auto', true, false or settings of the method 'fine-tune', not {tune!r}")
    return list(Recipe(steps=(step,)).check().steps)  # type: ignore[arg-type]
