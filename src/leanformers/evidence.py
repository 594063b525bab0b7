"""The results of the evidence scripts, read: what each method's paper claims, and whether it held here.

One JSON file per method, written by `evidence/<slug>.py` (see `evidence/claim.py`)::

    {"slug", "claim", "paper", "checks": [{"name", "required", "measured", "holds"}], "baseline", "result",
     "seeds", "seconds", "hardware", "versions", "commit"}
"""

from __future__ import annotations

import json
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


def number(value: Any) -> str:
    """A measured value as a text: four significant digits, whole numbers whole."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no"}.get(value, "–") if value is not None else "–"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return str(value)
