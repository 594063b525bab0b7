"""Which recipe to train next: the estimates' most promising, aim by aim, then where the frontier gains most.

An estimate is the recipe itself with its training cut to a few hundred examples. It says costs exactly and
ranks recipes of one kind, but its quality is too low. How much full training regains is learnt while the
search goes: `regained` is the median share of the gap to the baseline that training closed in the recipes
trained so far, and 0.7 before there is any.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leanformers.frontier.goals import Goal
from leanformers.frontier.pareto import Vector, hypervolume

REGAINED = 0.7
"""Share of the estimate's quality gap that full training is taken to close, before it has been seen."""
NEARLY = 0.97
"""Quality, as a ratio, that an aim asks for where no goal does."""
KEPT = 3.0
"""Costs, as a ratio, above which no point is kept."""
_GAIN = 1e-3
_BETTER = 2e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A recipe with its estimate and, once it was trained in full, its result on the same validation rows.

    quality, full: ratios to the baseline. seconds: what the full training is predicted to take; None if
    unknown.
    """

    key: str
    steps: list[dict[str, Any]]
    quality: float
    ratios: dict[str, float]
    measurement: dict[str, Any]
    trains: bool
    full: float | None = None
    in_hand: bool = False
    failed: bool = False
    seconds: float | None = None

    @property
    def known(self) -> bool:
        """Whether its quality is final: trained in full, or nothing to train."""
        return not self.failed and (self.full is not None or not self.trains)


def regained(candidates: Sequence[Candidate]) -> float:
    """Share of the estimate's quality gap that full training closed so far."""
    shares = [
        1 - max(0.0, 1 - c.full) / (1 - c.quality)
        for c in candidates
        if c.trains and c.full is not None and c.quality < 0.999
    ]
    return min(1.0, max(0.0, statistics.median(shares))) if shares else REGAINED


def predicted(candidate: Candidate, share: float) -> float:
    """Quality ratio to expect after full training."""
    if candidate.full is not None:
        return candidate.full
    if not candidate.trains or candidate.quality >= 1:
        return candidate.quality
    return 1 - (1 - share) * (1 - candidate.quality)


def quality_floor(goals: Sequence[Goal]) -> float:
    """The quality ratio that the goals ask for, NEARLY where none does."""
    asked = [goal.value for goal in goals if goal.metric == "quality" and goal.relative]
    return max(asked, default=NEARLY)


def reference_of(goals: Sequence[Goal], objectives: Sequence[str], cost: float = 1.1) -> tuple[float, ...]:
    """The corner of the hypervolume: 0.15 below the quality asked for, costs at `cost` times the baseline's.

    A little above 1 where gains are weighed, so that a recipe that leaves one cost as it is counts; well
    above where points are kept, since what saves bytes may cost time.
    """
    return (-(quality_floor(goals) - 0.15), *(cost for _ in objectives[1:]))


def vector(candidate: Candidate, objectives: Sequence[str], share: float) -> Vector:
    """What is minimised: the negated quality and the costs, as ratios."""
    return (-predicted(candidate, share), *(candidate.ratios.get(cost, 1.0) for cost in objectives[1:]))


def aims(goals: Sequence[Goal]) -> list[tuple[Goal, ...]]:
    """All cost goals at once, then each alone, so that a frontier keeps points for every one of them."""
    costs = [goal for goal in goals if goal.metric != "quality"]
    return [tuple(costs), *((goal,) for goal in costs if len(costs) > 1)] if costs else []


def next_to_train(
    candidates: Sequence[Candidate],
    goals: Sequence[Goal],
    objectives: Sequence[str],
    *,
    seconds_left: float | None = None,
) -> Candidate | None:
    """The recipe whose full training promises most, or None if none promises anything."""
    share = regained(candidates)
    floor = quality_floor(goals)
    waiting = [
        c
        for c in candidates
        if c.trains
        and c.full is None
        and not c.in_hand
        and not c.failed
        and (seconds_left is None or c.seconds is None or c.seconds <= seconds_left)
    ]
    options = []
    for aim in aims(goals):
        reached = [c for c in candidates if not c.failed and _meets(aim, c)]
        if any((c.known and predicted(c, share) >= floor) or c.in_hand for c in reached):
            continue
        fitting = [c for c in waiting if c in reached]
        if not fitting:
            continue
        best = max(fitting, key=lambda c: (predicted(c, share), -sum(c.ratios.get(o, 1.0) for o in objectives[1:])))
        tried = [c.full for c in reached if c.full is not None]
        if not tried:
            return best
        if predicted(best, share) > max(tried) + _BETTER:
            options.append(best)
    if options:
        return max(options, key=lambda c: predicted(c, share))
    return _widest(waiting, candidates, goals, objectives, share)


def _widest(
    waiting: Sequence[Candidate],
    candidates: Sequence[Candidate],
    goals: Sequence[Goal],
    objectives: Sequence[str],
    share: float,
) -> Candidate | None:
    """The one that adds most to what is dominated already."""
    corner = reference_of(goals, objectives)
    front = [vector(c, objectives, share) for c in candidates if c.known or c.in_hand]
    base = hypervolume(front, corner)
    gains = [(hypervolume([*front, vector(c, objectives, share)], corner) - base, c) for c in waiting]
    best = max(gains, key=lambda pair: pair[0], default=(0.0, None))
    return best[1] if best[0] > _GAIN * max(base, 1e-2) else None


def best_of_aims(candidates: Sequence[Candidate], goals: Sequence[Goal], share: float) -> list[Candidate]:
    """For each aim the candidate of the highest quality that reaches it."""
    found: list[Candidate] = []
    for aim in aims(goals):
        reached = [c for c in candidates if _meets(aim, c)]
        if reached:
            best = max(reached, key=lambda c: predicted(c, share))
            found += [best] if best not in found else []
    return found


def _meets(aim: Sequence[Goal], candidate: Candidate) -> bool:
    return all(goal.met(candidate.measurement, candidate.ratios) for goal in aim)
