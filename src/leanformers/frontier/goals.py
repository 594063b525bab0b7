"""Goals: what a search is to reach, as text such as "latency<=0.5x", "quality>=0.99x" or "bytes<=120MB"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from leanformers.errors import LeanError

COSTS = ("latency", "bytes", "parameters", "flops", "memory")
METRICS = ("quality", *COSTS)
GRAMMAR = (
    "METRIC<=NUMBER or METRIC>=NUMBER, METRIC being quality, latency, bytes, parameters, flops or memory, "
    "and NUMBER a ratio to the baseline (0.5x) or a value with or without a unit (120MB, 5ms, 10M)"
)
_SHAPE = re.compile(r"^\s*([a-zA-Z_]+)\s*(<=|>=|≤|≥)\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Zµ×]*)\s*$")
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_BYTES = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_UNITS: Mapping[str, Mapping[str, float]] = {
    "quality": {"": 1.0},
    "latency": _SECONDS,
    "bytes": _BYTES,
    "memory": _BYTES,
    "parameters": _COUNTS,
    "flops": _COUNTS,
}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A bound on one metric: a ratio to the baseline, or a value in the metric's own unit.

    Units: quality the task's, latency seconds per batch, bytes and memory bytes, parameters a count, flops
    per real token. A ratio of quality is above 1 where it is better, whatever the direction of the task's
    metric.
    """

    metric: str
    value: float
    relative: bool
    upper: bool

    @property
    def text(self) -> str:
        """The goal in its shortest form, absolute values without a unit."""
        number = f"{self.value:.10g}"
        return f"{self.metric}{'<=' if self.upper else '>='}{number}{'x' if self.relative else ''}"

    def met(self, measurement: Mapping[str, Any], ratios: Mapping[str, float]) -> bool:
        """Whether a point of this measurement and ratios reaches the goal; False where not measured."""
        found = (ratios if self.relative else measurement).get(self.metric)
        if found is None or found != found:
            return False
        return bool(found <= self.value if self.upper else found >= self.value)

    def excess(self, measurement: Mapping[str, Any], ratios: Mapping[str, float]) -> float:
        """By what share the goal is missed; 0 where it is met, infinite where it was not measured."""
        if self.met(measurement, ratios):
            return 0.0
        found = (ratios if self.relative else measurement).get(self.metric)
        if not found or found != found:
            return float("inf")
        return found / self.value - 1 if self.upper else self.value / found - 1


def parse(text: str, better: str = "higher") -> Goal:
    """Read a goal. `better`: the direction of the task's metric, for quality in the task's own unit.

    Raises:
        LeanError: the text is no goal; the sentence holds the grammar.
    """
    shape = _SHAPE.match(text) if isinstance(text, str) else None
    if shape is None:
        raise LeanError(f"the goal {text!r} cannot be read: write {GRAMMAR}")
    metric, sign, number, unit = shape[1].lower(), shape[2], float(shape[3]), shape[4]
    if metric not in METRICS:
        raise LeanError(f"the goal {text!r} names no metric that is measured: write {GRAMMAR}")
    relative = unit in ("x", "X", "×")
    units = _UNITS[metric]
    if not relative and unit.lower() not in units:
        known = ", ".join(["x", *filter(None, units)])
        raise LeanError(f"the goal {text!r} has the unit {unit!r}; the units of {metric} are {known}")
    upper = sign in ("<=", "≤")
    lower_is_right = metric != "quality" or (not relative and better == "lower")
    if upper != lower_is_right:
        right = "<=" if lower_is_right else ">="
        raise LeanError(f"the goal {text!r} asks for a worse model: {metric} takes {right}")
    value = number * (1.0 if relative else units[unit.lower()])
    if value <= 0:
        raise LeanError(f"the goal {text!r} cannot be reached: its number must be above 0")
    return Goal(metric=metric, value=value, relative=relative, upper=upper)


def relative(goal: Goal, quality: float, better: str) -> Goal:
    """The same goal as a ratio, where it is one on quality in the task's own unit; others as they are."""
    if goal.metric != "quality" or goal.relative or not quality:
        return goal
    ratio = goal.value / quality if better == "higher" else quality / goal.value
    return Goal(metric="quality", value=ratio, relative=True, upper=False)


def parse_all(texts: str | Iterable[str], better: str = "higher") -> tuple[Goal, ...]:
    """Read goals, given one by one or in one text separated by commas."""
    if isinstance(texts, str):
        texts = [part for part in texts.split(",") if part.strip()]
    return tuple(text if isinstance(text, Goal) else parse(text, better) for text in texts)


def objectives(goals: Iterable[Goal]) -> tuple[str, ...]:
    """What a search trades: quality and the costs that the goals name (latency and bytes if none)."""
    named = {goal.metric for goal in goals}
    costs = [cost for cost in COSTS if cost in named] or ["latency", "bytes"]
    return ("quality", *costs)
