"""From a run's record to what the page shows: texts, order, and who beat whom. No HTML here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leanformers.report.quantities import QUANTITIES, TABLE, is_number, metric_title, ratio, seconds, written
from leanformers.report.snippets import TIERS, load_lines
from leanformers.report.zeros import zeros

Point = Mapping[str, Any]

STATUS = {
    "frontier": "on the frontier",
    "baseline": "baseline",
    "reference": "reference",
    "dominated": "dominated",
    "estimated": "estimate only",
    "failed": "failed",
}
_ORDER = {"dominated": 0, "estimated": 1, "failed": 2}


def steps(point: Point) -> list[dict[str, Any]]:
    """The steps of a point's recipe."""
    recipe = point.get("recipe")
    if isinstance(recipe, Mapping):
        recipe = recipe.get("steps")
    return [dict(step) for step in recipe or ()]


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_setting, value)) + "]"
    return str(value)


def step_texts(point: Point) -> list[tuple[str, str]]:
    """Each step as its method and its settings in a line: ("greenformers", "rank 0.5, solver svd")."""
    return [
        (
            str(step.get("method", "?")),
            ", ".join(
                f"{name.replace('_', ' ')} {_setting(value)}" for name, value in step.items() if name != "method"
            ),
        )
        for step in steps(point)
    ]


def summary(point: Point) -> str:
    """The recipe in a few words: its methods in order."""
    return " + ".join(method for method, _ in step_texts(point))


def added(data: Mapping[str, Any], point: Point) -> str:
    """What a point's recipe adds to the baseline's, in a line: "drop-layers (keep 0.5) + quantization"."""
    base = step_texts(data["baseline"])
    own = step_texts(point)
    own = own[len(base) :] if own[: len(base)] == base else own
    return " + ".join(f"{method} ({settings})" if settings else method for method, settings in own)


def quantities(data: Mapping[str, Any]) -> list[str]:
    """The axes for which at least two points have a number, in the order of the table."""
    everyone = [data["baseline"], *data.get("references", ()), *data.get("points", ())]
    keys = [*TABLE, *(key for key in QUANTITIES if key not in TABLE)]
    return [key for key in keys if sum(is_number((point.get("measurement") or {}).get(key)) for point in everyone) > 1]


def better(data: Mapping[str, Any], key: str) -> str:
    """Which direction of an axis is better; the quality's is the task's (bits per byte: lower)."""
    if key == "quality":
        return str(data.get("task", {}).get("better") or "higher")
    return QUANTITIES[key].better


def goal_limits(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each goal as {"text", "key", "limit", "met", "base"}.

    limit: in the axis's own unit, None where the baseline was not measured. met: frontier points that do. base: whether
    the baseline does.
    """
    from leanformers.frontier.goals import parse

    found = []
    base = data["baseline"].get("measurement") or {}
    winners = [point for point in data.get("points", ()) if point.get("status") == "frontier"]
    for text in data.get("goals") or ():
        goal = parse(str(text), better(data, "quality"))
        limit: float | None = goal.value
        if goal.relative:
            own = base.get(goal.metric)
            inverse = goal.metric == "quality" and better(data, "quality") == "lower"
            limit = None if not is_number(own) else own / goal.value if inverse else own * goal.value
        amount = ratio(goal.value) if goal.relative else QUANTITIES[goal.metric].write(goal.value)
        amount = re.sub(r"(\.\d*?)0+(?=\D|$)", r"\1", amount).replace(".×", "×").replace(". ", " ")
        sign = "≤" if goal.upper else "≥"
        met = sum(goal.met(point.get("measurement") or {}, point.get("ratios") or {}) for point in winners)
        as_it_is = goal.met(base, data["baseline"].get("ratios") or {})
        text = f"{goal.metric} {sign} {amount}"
        found.append({"text": text, "key": goal.metric, "limit": limit, "met": met, "base": as_it_is})
    return found


def at_odds(data: Mapping[str, Any]) -> bool:
    """Whether each goal is reached by some point of the frontier, and all of them by none."""
    winners = [point for point in data.get("points", ()) if point.get("status") == "frontier"]
    goals = goal_limits(data)
    return bool(goals) and all(goal["met"] for goal in goals) and not any(point.get("meets") for point in winners)


def letters(data: Mapping[str, Any]) -> dict[str, str]:
    """A letter for each point of the frontier, by which pictures name it: A, B, … Z, A2, B2 …"""
    winners = [point for point in data.get("points", ()) if point.get("status") == "frontier"]
    return {
        str(point["name"]): chr(ord("A") + place % 26) + (str(place // 26 + 1) if place >= 26 else "")
        for place, point in enumerate(winners)
    }


def beaten_by(data: Mapping[str, Any], point: Point) -> str | None:
    """The name of a frontier point that is at least as good on every objective both have, better on one."""
    keys: Sequence[str] = data.get("objectives") or TABLE
    own = point.get("measurement") or {}
    for other in [data["baseline"], *data.get("points", ())]:
        if other is point or other.get("status") not in ("frontier", "baseline"):
            continue
        theirs = other.get("measurement") or {}
        shared = [key for key in keys if is_number(own.get(key)) and is_number(theirs.get(key))]
        signs = [1 if better(data, key) == "higher" else -1 for key in shared]
        gains = [sign * (theirs[key] - own[key]) for key, sign in zip(shared, signs, strict=True)]
        if gains and min(gains) >= 0 and max(gains) > 0:
            return str(other["name"])
    return None


def reason(data: Mapping[str, Any], point: Point) -> str:
    """Why a point is not on the frontier."""
    if point.get("reason"):
        told = str(point["reason"])
        for name, letter in letters(data).items():
            told = told.replace(name, letter)
        return told
    if point.get("status") == "dominated":
        winner = beaten_by(data, point)
        winner = letters(data).get(winner or "", winner)
        return f"{winner} is at least as good on every measure that counts" if winner else "better points were found"
    return "its estimate did not look promising enough to train it" if point.get("status") == "estimated" else ""


def runtime_of(point: Point) -> str | None:
    """Where a point was measured."""
    return (point.get("measurement") or {}).get("runtime")


def loads_with(point: Point) -> str | None:
    """The tier, or the runtime of an exported folder."""
    tier = point.get("tier")
    return runtime_of(point) if tier == "runtime" else tier


def row(data: Mapping[str, Any], point: Point, folder: Path | None = None) -> dict[str, Any]:
    """All that the page says of one point, as texts."""
    place = point.get("folder")
    if place and folder is not None and not Path(place).is_absolute():
        place = str(folder / place)
    tier = point.get("tier")
    return {
        "name": str(point["name"]),
        "letter": letters(data).get(str(point["name"]), ""),
        "status": point.get("status", "dominated"),
        "status_text": STATUS.get(point.get("status", ""), str(point.get("status"))),
        "summary": summary(point),
        "steps": step_texts(point),
        "cells": {key: written(key, point) for key in QUANTITIES},
        "tier": tier,
        "loads_with": loads_with(point),
        "tier_text": TIERS.get(tier or "", ""),
        "folder": place,
        "lines": load_lines(place, data.get("task", {}).get("kind", ""), tier, runtime_of(point)) if place else [],
        "reason": reason(data, point),
        "zeros": zeros(steps(point)),
        "meets": point.get("meets"),
        "best": point.get("name") == data.get("best") and data.get("best") is not None,
        "notes": point.get("notes") or {},
    }


def plot_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """What the plot's script needs: axes, points with numbers and texts, and the goals' limits."""
    keys = quantities(data)
    marks = letters(data)
    entries = []
    for point in [*data.get("points", ()), *data.get("references", ()), data["baseline"]]:
        measured = point.get("measurement") or {}
        values = {key: measured[key] for key in keys if is_number(measured.get(key))}
        if point.get("status") == "failed" or not values:
            continue
        entries.append(
            {
                "name": str(point["name"]),
                "label": marks.get(str(point["name"])) or str(point["name"]),
                "title": summary(point) or str(point["name"]),
                "status": point.get("status", "dominated"),
                "note": STATUS.get(point.get("status", ""), ""),
                "best": point.get("name") == data.get("best"),
                "tier": point.get("tier") or "",
                "runtime": runtime_of(point) or "",
                "values": values,
                "texts": {key: list(written(key, point)) for key in keys},
                "steps": [list(step) for step in step_texts(point)],
                "reason": "" if point.get("status") in ("frontier", "baseline") else reason(data, point),
            }
        )
    axes = [
        {
            "key": key,
            "title": metric_title(data.get("task", {})) if key == "quality" else QUANTITIES[key].title,
            "unit": QUANTITIES[key].unit,
            "better": better(data, key),
        }
        for key in keys
    ]
    return {"axes": axes, "points": entries, "goals": [goal for goal in goal_limits(data) if goal["limit"]]}


def headline(data: Mapping[str, Any]) -> str:
    """In a sentence or two: how much was tried, and what came of it."""
    points = data.get("points", ())
    winners = [point for point in points if point.get("status") == "frontier"]
    names = {str(point["name"]).partition("@")[0] for point in points}  # NAME@RUNTIME is NAME in another runtime
    recipes = len(names - {str(data["baseline"]["name"])})
    tried = f"{recipes} recipe{'s' if recipes != 1 else ''} tried"
    if data["baseline"].get("tier") == "runtime":
        tried += f" as {runtime_of(data['baseline'])} runs them"
    if data.get("seconds"):
        tried += f" in {seconds(data['seconds'])}"
    told = f"{tried}; none beats the model as it is."
    if winners:
        verb = "is" if len(winners) == 1 else "are"
        told = f"{tried}; {len(winners)} {verb} beaten by no other on all measures at once."
    elif {str(point.get("status")) for point in points} & {"estimated", "dominated"} == {"estimated"}:
        told = (
            f"{tried}, by estimates alone: none was run in full in the time given. The same command goes on from here."
        )
    if not recipes:
        spent = f" ({seconds(data['seconds'])} went into the baseline)" if data.get("seconds") else ""
        told = f"No recipe has been tried yet{spent}: the same command goes on from here."
    for point in data.get("references", ()):
        if not point.get("recipe") and (point.get("ratios") or {}).get("quality", 0) > 1:
            told += f" But {point['name']} does better than the model itself: is a transformer needed here?"
    return told


def flat(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Facts as label and text; the hardware's one by one, other nested mappings as one text each."""
    rows: list[tuple[str, str]] = []
    for label, value in facts.items():
        if label == "hardware" and isinstance(value, Mapping):
            rows += flat(value)
            continue
        if label == "memory" and is_number(value):
            value = QUANTITIES["memory"].write(value)
        elif isinstance(value, Mapping):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        elif isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            rows.append((str(label).replace("_", " "), str(value)))
    return rows


def losers(data: Mapping[str, Any]) -> list[Point]:
    """What was tried and is not on the frontier: dominated ones first, best quality first."""
    lost = [point for point in data.get("points", ()) if point.get("status") != "frontier"]
    sign = -1 if better(data, "quality") == "higher" else 1

    def key(point: Point) -> tuple[int, float]:
        quality = (point.get("measurement") or {}).get("quality")
        return _ORDER.get(point.get("status", ""), 3), sign * quality if is_number(quality) else float("inf")

    return sorted(lost, key=key)
