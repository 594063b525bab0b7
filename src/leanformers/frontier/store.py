"""The trials of a run: an Optuna study in sqlite that several processes may share and that outlives them.

A trial in hand is held by a lock file that the system frees when its process ends, however it ends. A trial
that is still marked as running while nobody holds its lock was cut off: it is marked so and its recipe is
put up again, twice at most, since a recipe that kills its process (no memory left) would do so for ever.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from leanformers.folders import guarding_disk
from leanformers.frontier.space import Space, Steps
from leanformers.recipe import key_of

if TYPE_CHECKING:
    import optuna

ATTEMPTS = 3
_DRAWS = 60
_RANDOM_FROM = 10
CUT_OFF = "its process ended while it ran"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One recipe that was tried as an estimate. state: "done", "failed", "running" or "cut off"."""

    number: int
    key: str
    steps: Steps
    state: str
    result: dict[str, Any] | None = None
    reason: str | None = None


Propose = Callable[[list[Record], set[str]], Steps | None]


class Store:
    """The trials of one run folder."""

    def __init__(self, folder: Path, space: Space, objectives: Sequence[str], seed: int) -> None:
        self.folder, self.space, self.objectives, self.seed = folder, space, tuple(objectives), seed
        self.locks = folder / "locks"
        self.locks.mkdir(parents=True, exist_ok=True)
        self._held: dict[int, FileLock] = {}
        with self._alone():
            self.study = self._open()

    # -- opening -------------------------------------------------------------------------------------------
    def _open(self) -> optuna.Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(
            storage=self._storage(),
            study_name="-".join([*self.objectives, self.space.digest]),
            directions=["maximize", *(["minimize"] * (len(self.objectives) - 1))],  # type: ignore[list-item]
            load_if_exists=True,
        )
        # A second process, and a run that goes on, must not draw the same recipes again.
        places = ((i, self._take(f"worker-{i}")) for i in range(10_000))
        worker, self._place = next((i, lock) for i, lock in places if lock is not None)
        study.sampler = _sampler(self.seed + 7919 * worker + len(study.trials))
        return study

    def _storage(self) -> Any:
        """Where the study is kept: on disk, for all processes."""
        import optuna

        return optuna.storages.RDBStorage(
            f"sqlite:///{self.folder / 'study.db'}", engine_kwargs={"connect_args": {"timeout": 120}}
        )

    def _take(self, name: str) -> FileLock | None:
        """The lock of that name, if nobody holds it."""
        lock = FileLock(self.locks / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Changes of the study are made by one process at a time."""
        with guarding_disk(self.folder), FileLock(self.locks / "study.lock", timeout=600):
            yield

    def enqueue(self, recipes: Sequence[Steps]) -> None:
        """Put these recipes up first, once per study."""
        with self._alone():
            if self.study.user_attrs.get("enqueued"):
                return
            for steps in recipes:
                self._put_up(steps, attempt=1)
            self.study.set_user_attr("enqueued", True)

    def _put_up(self, steps: Steps, attempt: int) -> None:
        attributes = {"steps": json.dumps(steps), "attempt": attempt}
        self.study.enqueue_trial(self.space.params(steps), user_attrs=attributes)

    # -- taking and ending ---------------------------------------------------------------------------------
    def next(self, wanted: int, propose: Propose | None = None) -> tuple[int, Steps] | None:
        """Take a recipe that was not tried yet: (trial's number, steps).

        propose: gives a recipe when none is put up, from the records and the keys that are taken; where it
            gives
        none, or without it, the study's sampler draws.

        None when `wanted` recipes were tried or are in hand, or when the space seems exhausted.
        """
        import optuna

        with self._alone():
            self._revive()
            records = self.records()
            if sum(record.state in ("done", "failed", "running") for record in records) >= wanted:
                return None
            seen = {record.key for record in records if record.state != "cut off"}
            if propose is not None and not self._waiting():
                proposed = propose(records, seen)
                if proposed:
                    self._put_up(proposed, attempt=1)
            usual = self.study.sampler
            try:
                for draw in range(_DRAWS):
                    if draw == _RANDOM_FROM:
                        self.study.sampler = optuna.samplers.RandomSampler(seed=self.seed + len(self.study.trials))
                    trial = self.study.ask()
                    lock = self._take(f"trial-{trial.number}")
                    assert lock is not None
                    drawn = self.space.suggest(trial)
                    put_up = trial.user_attrs.get("steps")
                    steps = json.loads(put_up) if put_up else drawn
                    key = key_of(steps)
                    if steps and key not in seen:
                        trial.set_user_attr("steps", json.dumps(steps))
                        trial.set_user_attr("key", key)
                        self._held[trial.number] = lock
                        return trial.number, steps
                    trial.set_user_attr("state", "duplicate")
                    self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
                    lock.release()
            finally:
                self.study.sampler = usual
        return None

    def _waiting(self) -> bool:
        import optuna

        return bool(self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.WAITING]))

    def done(self, number: int, values: Sequence[float], result: dict[str, Any]) -> None:
        """Write a trial's result: the objectives' values and all that was measured."""
        with self._alone():
            self._trial(number).set_user_attr("result", json.dumps(result))
            self.study.tell(number, list(values))
            self._release(number)

    def failed(self, number: int, reason: str) -> None:
        """Write down why a trial failed."""
        self._fail(number, "failed", reason)

    def cut_off(self, number: int) -> None:
        """Give a trial back whose user interrupted it."""
        self._fail(number, "cut off", "interrupted")

    def _fail(self, number: int, state: str, reason: str) -> None:
        import optuna

        with self._alone():
            trial = self._trial(number)
            trial.set_user_attr("state", state)
            trial.set_user_attr("reason", reason)
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)
            if state == "cut off":
                self._put_up(json.loads(trial.user_attrs["steps"]), attempt=trial.user_attrs.get("attempt", 1))
            self._release(number)

    def _trial(self, number: int) -> optuna.Trial:
        import optuna

        return optuna.Trial(self.study, self.study.get_trials(deepcopy=False)[number]._trial_id)

    def _release(self, number: int) -> None:
        lock = self._held.pop(number, None)
        if lock is not None:
            lock.release()

    def _revive(self) -> None:
        """Mark trials that nobody holds as cut off, and put their recipes up again."""
        import optuna

        for frozen in self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            if frozen.number in self._held:
                continue
            lock = self._take(f"trial-{frozen.number}")
            if lock is None:
                continue
            trial, steps = self._trial(frozen.number), frozen.user_attrs.get("steps")
            attempt = frozen.user_attrs.get("attempt", 1)
            again = steps is not None and attempt < ATTEMPTS
            trial.set_user_attr("state", "cut off" if again or steps is None else "failed")
            trial.set_user_attr("reason", CUT_OFF if again else f"{CUT_OFF}, {attempt} times (memory?)")
            self.study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
            if again:
                self._put_up(json.loads(str(steps)), attempt + 1)
            lock.release()

    # -- reading -------------------------------------------------------------------------------------------
    def records(self) -> list[Record]:
        """All trials that are or were tried, in order; duplicates and those that wait are left out."""
        import optuna

        states = {"COMPLETE": "done", "RUNNING": "running"}
        found = []
        for frozen in self.study.get_trials(deepcopy=False):
            attributes = frozen.user_attrs
            state = states.get(frozen.state.name, attributes.get("state"))
            if frozen.state == optuna.trial.TrialState.WAITING or state == "duplicate" or "key" not in attributes:
                continue
            found.append(
                Record(
                    number=frozen.number,
                    key=attributes["key"],
                    steps=json.loads(attributes["steps"]),
                    state=state or "failed",
                    result=json.loads(attributes["result"]) if "result" in attributes else None,
                    reason=attributes.get("reason"),
                )
            )
        return found

    def others_running(self) -> bool:
        """Whether another process has a trial in hand."""
        with self._alone():
            self._revive()
            return any(r.state == "running" and r.number not in self._held for r in self.records())


def _sampler(seed: int) -> Any:
    import warnings

    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # multivariate and group are marked as experimental
        return optuna.samplers.TPESampler(multivariate=True, group=True, n_startup_trials=8, seed=seed)
