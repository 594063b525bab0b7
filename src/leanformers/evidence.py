"""The results of the evidence scripts, read: what each method's paper claims, and whether it held here.

One JSON file per method, written by `evidence/<slug>.py` (see `evidence/claim.py`)::

    {"slug", "claim", "paper", "checks": [{"name", "required", "measured", "holds"}], "baseline", "result",
     "seeds", "seconds", "hardware", "versions", "commit"}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FIELDS = (
    "slug", "claim", "paper", "checks", "baseline", "result",
    "seeds", "seconds", "hardware", "versions", "commit",
)  # fmt: skip

_PACKAGE = Path(__file__).parent


def folder() -> Path | None:
    """Where the results are: in the checkout, or shipped inside the package; None if there are none."""
    for place in (_PACKAGE.parents[1] / "evidence" / "results", _PACKAGE / "evidence_results"):
        if place.is_dir():
            return place
    return None


def results(place: Path | None = None) -> dict[str, dict[str, Any]]:
    """All results by slug, sorted."""
    place = place or folder()
    found = [json.loads(path.read_text("utf-8")) for path in sorted(place.glob("*.json"))] if place else []
    return {result["slug"]: result for result in found}


def verdict(result: dict[str, Any]) -> str:
    """ "held", "not held", or how many of several checks held."""
    held, checks = sum(bool(check["holds"]) for check in result["checks"]), len(result["checks"])
    if held == checks:
        return "held"
    return "not held" if held == 0 else f"{held} of {checks} held"


TOLERANCE = 1e-3  # of the outputs' scale, below which a runtime counts as exact


def exports(place: Path | None = None) -> dict[str, Any]:
    """What `evidence/exports.py` found: "distances" (runtime -> family -> edit -> how far its outputs lie, or the
    sentence that refuses it, or None) and "edits" (an edit as drawn -> its type); empty where it did not run."""
    found = results(place).get("exports", {}).get("result")
    return found or {"distances": {}, "edits": {}}


def runs_exactly(edits: Iterable[str], found: Mapping[str, Any] | None = None) -> dict[str, tuple[int, int]]:
    """runtime -> in how many families edits of these types were exact, and in how many they were tried."""
    found, wanted = found or exports(), set(edits)
    counted = {}
    for runtime, families in found["distances"].items():
        tried = exact = 0
        for cells in families.values():
            values = [v for kind, v in cells.items() if found["edits"].get(kind) in wanted and v is not None]
            tried += bool(values)
            exact += bool(values) and all(not isinstance(v, str) and v <= TOLERANCE for v in values)
        counted[runtime] = (exact, tried)
    return counted


def runs_in(edits: Iterable[str], found: Mapping[str, Any] | None = None) -> str:
    """Where models with edits of these types answer as in PyTorch, in a line; "" where it is not known."""
    edits = list(edits)
    counted = {runtime: pair for runtime, pair in runs_exactly(edits, found).items() if pair[1]}
    whole = [runtime for runtime, (exact, tried) in counted.items() if exact == tried]
    some = [f"{runtime} in {exact} of {tried} families" for runtime, (exact, tried) in counted.items() if exact < tried]
    return ", ".join([*whole, *some])


def number(value: Any) -> str:
    """A measured value as a text: four significant digits, whole numbers whole."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no"}.get(value, "–") if value is not None else "–"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return str(value)
