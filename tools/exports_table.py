"""The tables of docs/deploy.md: which edit runs in which runtime, from evidence/results/exports.json."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from leanformers import evidence

Cells = Mapping[str, float | str | None]


def table(found: Mapping[str, Any]) -> str:
    """Both tables, and what is refused."""
    distances: Mapping[str, Mapping[str, Cells]] = found["distances"]
    if not distances:
        return "No exports have been recorded yet."
    parts = [by_family(distances), by_edit(distances), refused(distances)]
    if untried := found.get("untried"):
        parts.append(f"Not tried: {', '.join(untried)}.")
    return "\n\n".join(part for part in parts if part)


def by_family(distances: Mapping[str, Mapping[str, Cells]]) -> str:
    """How many of a family's cases are exact in each runtime, and how far the farthest lies."""
    families = list(dict.fromkeys(family for rows in distances.values() for family in rows))
    lines = [f"| family | {' | '.join(distances)} |", "| --- |" + " --- |" * len(distances)]
    for family in families:
        cells = [_summary(rows.get(family, {})) for rows in distances.values()]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_edit(distances: Mapping[str, Mapping[str, Cells]]) -> str:
    """In how many families an edit is exact in each runtime, of those that have a place for it."""
    kinds = list(dict.fromkeys(kind for rows in distances.values() for cells in rows.values() for kind in cells))
    lines = [f"| edit | {' | '.join(distances)} |", "| --- |" + " --- |" * len(distances)]
    for kind in kinds:
        cells = []
        for rows in distances.values():
            values = [cells[kind] for cells in rows.values() if cells.get(kind) is not None]
            exact = sum(map(_exact, values))
            cells.append(f"{exact} of {len(values)} families" if values else "–")
        lines.append(f"| {kind.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def refused(distances: Mapping[str, Mapping[str, Cells]]) -> str:
    """What is not exact, each with what is said of it."""
    from evidence_table import text

    told: dict[tuple[str, str], list[str]] = defaultdict(list)
    for runtime, rows in distances.items():
        for family, cells in rows.items():
            for kind, value in cells.items():
                if value is not None and not _exact(value):
                    said = text(value) if isinstance(value, str) else f"it answers otherwise, by {value:g}"
                    told[runtime, f"{family}: {said}"].append(kind.replace("_", " "))
    lines = [f"- {runtime}, {', '.join(kinds)} on {said}." for (runtime, said), kinds in told.items()]
    return "\n".join(["Not exact:", "", *lines]) if lines else ""


def _exact(value: float | str | None) -> bool:
    return isinstance(value, int | float) and value <= evidence.TOLERANCE


def _summary(cells: Cells) -> str:
    values = [value for value in cells.values() if value is not None]
    if not values:
        return "–"
    exact = [value for value in values if isinstance(value, int | float) and _exact(value)]
    farthest = f", within {max(exact):.0e}" if exact and max(exact) > 0 else ""
    return f"{len(exact)} of {len(values)}{farthest}"
