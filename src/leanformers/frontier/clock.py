"""The time that a search was given, and what fits into it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from leanformers.errors import Enough

TUNED = 0.35  # share of the time by which the baseline is trained
LAST = 0.1  # share that is put aside for the last measurement; further runtimes take as much again
LEAST = 32  # rows on which something is measured, however short the time
LEAST_TEST = 200  # test rows of the verdict: a goal of a few per cent cannot be told on fewer
_PROBE = 8  # steps of a training that is timed before it is cut
VALIDATION = 0.02  # share of the time that an estimate may take for its answers
TIMING = 0.04  # share that the timing of an estimate may take
TEST = 0.05  # share that the baseline's answers on the test rows may take


@dataclass(kw_only=True)
class Clock:
    """Counts from the call of a search. minutes: its limit, None for none. now: seconds of a clock that only rises."""

    minutes: float | None = None
    now: Callable[[], float] = field(default=lambda: time.monotonic())
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.now()

    @property
    def passed(self) -> float:
        return self.now() - self.start

    def left(self, share: float = 1.0) -> float | None:
        """Seconds until this share of the time is over, below 0 afterwards; None without a limit."""
        return None if self.minutes is None else 60 * self.minutes * share - self.passed

    def up(self, share: float = 1.0) -> bool:
        """Whether this share of the time is over."""
        left = self.left(share)
        return left is not None and left <= 0

    def rows(
        self, wanted: int | None, there: int, share: float, seconds_each: float, least: int | None = None
    ) -> int | None:
        """How many of so many rows fit into a share of the time; `wanted` where they all do."""
        if self.minutes is None:
            return wanted
        return fitting(wanted, there, 60 * self.minutes * share, seconds_each, least)


def fitting(
    wanted: int | None, there: int, seconds: float, seconds_each: float, least: int | None = None
) -> int | None:
    """How many of so many rows fit into these seconds, at least LEAST or `least`; `wanted`, None for all, if so."""
    rows = max(LEAST if least is None else least, int(seconds / max(seconds_each, 1e-9)))
    return wanted if rows >= (there if wanted is None else min(wanted, there)) else rows


class Stop:
    """A callback that ends a training, or tells how long its steps take.

    until: of the clock, None for no end. steps: after how many it ends, None for all.
    """

    def __init__(self, clock: Clock, until: float | None = None, steps: int | None = None) -> None:
        self.clock, self.until, self.steps = clock, until, steps
        self.begun = clock.now()
        self.times: list[float] = []
        self.total = 0
        self.early = False

    def after_step(self, model: Any, step: int, total: int) -> None:
        self.times.append(self.clock.now())
        self.total = total
        late = self.until is not None and self.times[-1] >= self.until
        enough = self.steps is not None and len(self.times) >= self.steps
        if (late or enough) and step < total:
            self.early = True
            raise Enough

    @property
    def seconds(self) -> float:
        """What the whole training takes, from the steps after the first, which warms up."""
        if len(self.times) < 2:
            return self.total * (self.times[0] - self.begun) if self.times else 0.0
        return self.total * (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def probe(clock: Clock) -> Stop:
    """A callback that times a few steps, as many as a twentieth of the time holds."""
    return Stop(clock, None if clock.minutes is None else clock.now() + 3 * clock.minutes, steps=_PROBE)


def cut(steps: Sequence[Mapping[str, Any]], seconds: float, left: float) -> list[dict[str, Any]]:
    """The training steps with their epochs cut by the same share, so that `seconds` become at most `left`."""
    from leanformers.methods import get

    share = min(1.0, max(left, 0.0) / seconds) if seconds > 0 else 1.0
    cuts = []
    for step in steps:
        usual = next((entry.default for entry in get(step["method"]).settings if entry.name == "epochs"), None)
        epochs = step.get("epochs", usual)
        cuts.append(dict(step) if epochs is None else {**step, "epochs": max(1e-6, float(f"{epochs * share:.3g}"))})
    return cuts
