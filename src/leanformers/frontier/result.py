"""What a search gives: points with their recipes and measurements, as Python and as frontier.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanformers.frontier.goals import Goal
from leanformers.frontier.pareto import hypervolume
from leanformers.recipe import Recipe

if TYPE_CHECKING:
    from leanformers.measure import Measurement

SCHEMA = 1
FILE = "frontier.json"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One recipe and what came of it.

    status: "baseline", "reference", "frontier", "dominated", "estimated" (costs exact, quality of a short
    training on part of the validation rows) or "failed". ratios: to the baseline, the quality's above 1
    where it is better.
    tier: "stock" or "lean", where a checkpoint was written to `folder`, "runtime" where an export was. reason: why it
    is not on the frontier.
    """

    name: str
    status: str
    recipe: Recipe | None = None
    measurement: Measurement | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    folder: Path | None = None
    tier: str | None = None
    reason: str | None = None
    meets: bool | None = None
    seconds: float | None = None

    def to_json(self, start: Path) -> dict[str, Any]:
        """Plain data; `folder` relative to the run's."""
        folder = None
        if self.folder is not None:
            inside = self.folder.is_relative_to(start)
            folder = str(self.folder.relative_to(start) if inside else self.folder)
        recipe = None
        if self.recipe is not None:
            kept = ("model", "task", "dtype", "seed")
            recipe = {name: getattr(self.recipe, name) for name in kept}
            recipe["steps"] = [dict(step) for step in self.recipe.steps]
        return {
            "name": self.name,
            "status": self.status,
            "recipe": recipe,
            "measurement": self.measurement.to_json() if self.measurement is not None else None,
            "ratios": dict(self.ratios),
            "tier": self.tier,
            "folder": folder,
            "reason": self.reason,
            "meets": self.meets,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The outcome of a search.

    points: the non-dominated ones, each with a checkpoint. trials: all others that were tried. skipped:
    methods that were left out, with the reason. status: "complete" or "interrupted". runtime: where the search
    measured, and the baseline that ratios are to.
    """

    folder: Path
    model: str
    task: Mapping[str, Any]
    goals: tuple[Goal, ...]
    objectives: tuple[str, ...]
    baseline: Point
    references: tuple[Point, ...]
    points: tuple[Point, ...]
    trials: tuple[Point, ...]
    skipped: Mapping[str, str]
    status: str
    seed: int
    seconds: float
    created: str
    environment: Mapping[str, Any]
    runtime: str = "torch"

    @property
    def best(self) -> Point | None:
        """The point to take: of those that meet every goal the cheapest, else the one that misses least."""
        return min(self.points, key=lambda point: _badness(point, self.goals, self.objectives), default=None)

    def hypervolume(self, quality: float = 0.9, cost: float = 1.1) -> float:
        """Volume dominated by the points, in ratios, above this quality and below these costs."""
        corner = (-quality, *(cost for _ in self.objectives[1:]))
        return hypervolume([minimised(point.ratios, self.objectives) for point in self.points], corner)

    def to_json(self) -> dict[str, Any]:
        """Plain data of schema 1, as `leanformers.report` reads it."""
        return {
            "schema": SCHEMA,
            "name": self.folder.resolve().name,
            "model": self.model,
            "task": dict(self.task),
            "goals": [goal.text for goal in self.goals],
            "objectives": list(self.objectives),
            "status": self.status,
            "seed": self.seed,
            "seconds": self.seconds,
            "created": self.created,
            "runtime": self.runtime,
            "best": self.best.name if self.best is not None else None,
            "baseline": self.baseline.to_json(self.folder),
            "references": [point.to_json(self.folder) for point in self.references],
            "points": [point.to_json(self.folder) for point in (*self.points, *self.trials)],
            "skipped": dict(self.skipped),
            "environment": dict(self.environment),
        }


def minimised(ratios: Mapping[str, float], objectives: Sequence[str], digits: int | None = None) -> tuple[float, ...]:
    """Ratios as a vector to minimise, unknown ones as the baseline's. digits: round, against noise."""
    found = [-ratios.get("quality", 0.0), *(ratios.get(cost, 1.0) for cost in objectives[1:])]
    if digits is None:
        return tuple(found)
    rounding = [digits if name in ("latency", "throughput") else digits + 1 for name in objectives]
    return tuple(round(value, places) for value, places in zip(found, rounding, strict=True))


def _badness(point: Point, goals: Sequence[Goal], objectives: Sequence[str]) -> tuple[float, float]:
    """By how much the goals are missed, then how expensive the point is, quality counted against cost."""
    measured = point.measurement.to_json() if point.measurement is not None else {}
    missed = sum(goal.excess(measured, point.ratios) for goal in goals)
    costs = [max(point.ratios.get(cost, 1.0), 1e-9) for cost in objectives[1:]]
    cost = sum(map(math.log, costs)) / len(costs)
    if any(goal.metric == "quality" for goal in goals):
        return missed, cost
    # Where no quality is asked for, a percent of it weighs as much as a fifth of the costs.
    return missed, cost - 20 * min(0.0, point.ratios.get("quality", 0.0) - 1.0)
