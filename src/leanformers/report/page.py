"""The HTML page: everything inlined, nothing fetched, all text escaped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from leanformers import evidence
from leanformers.errors import LeanError
from leanformers.report import view
from leanformers.report.picture import picture
from leanformers.report.quantities import QUANTITIES, TABLE, metric_title, seconds

SCHEMA = 1
_TEMPLATES = Path(__file__).parent / "templates"


def render(data: Mapping[str, Any], folder: str | Path | None = None) -> str:
    """The report as one HTML document. `folder`: where relative folders start, as its reader types it."""
    if data.get("schema", SCHEMA) > SCHEMA or "baseline" not in data:
        raise LeanError(
            f"frontier.json has schema {data.get('schema')} and no report can be made of it: "
            "use the version of leanformers that wrote it"
        )
    here = Path(folder) if folder is not None else None
    points = [view.row(data, point, here) for point in data.get("points", ()) if point["status"] == "frontier"]
    baseline = view.row(data, data["baseline"], here)
    best = next((row for row in points if row["best"]), None)
    lost = [view.row(data, point, here) for point in view.losers(data)]
    return _template().render(
        data=data,
        headline=view.headline(data),
        goals=view.goal_limits(data),
        at_odds=view.at_odds(data),
        baseline=baseline,
        references=[view.row(data, point, here) for point in data.get("references", ())],
        points=points,
        best=best,
        lost=lost,
        columns=[
            {
                "key": key,
                "title": metric_title(data.get("task", {})) if key == "quality" else QUANTITIES[key].title,
                "unit": QUANTITIES[key].unit,
                "arrow": "↑" if view.better(data, key) == "higher" else "↓",
            }
            for key in TABLE
        ],
        environment=view.flat(data.get("environment", {})),
        task=[fact for fact in view.flat(data.get("task", {})) if fact[0] != "better"],
        runs_in={row["name"]: _runs_in(row["steps"]) for row in points if row["tier"] == "lean"},
        recipes={point["name"]: _yaml(point.get("recipe")) for point in data.get("points", ())},
        took=seconds(data["seconds"]) if data.get("seconds") else "",
        static=picture(data),
        plot=_json(view.plot_data(data)),
        css=(_TEMPLATES / "page.css").read_text("utf-8"),
        script=(_TEMPLATES / "plot.js").read_text("utf-8"),
    )


def write(data: Mapping[str, Any], path: str | Path) -> Path:
    """Write the report to `path` (by renaming a finished file); relative folders start beside it."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(render(data, path.parent), "utf-8")
    return unfinished.replace(path)


def _runs_in(steps: Sequence[tuple[str, str]]) -> str:
    """Where models with the edits of these methods answer as in PyTorch; "" where it is not known."""
    from leanformers.methods import methods

    known = methods()
    edits = {edit for method, _ in steps if method in known for edit in known[method].edits}
    return evidence.runs_in(sorted(edits)) if edits else ""


def _yaml(recipe: Any) -> str:
    import yaml

    if not recipe:
        return ""
    return yaml.safe_dump(json.loads(json.dumps(recipe)), sort_keys=False, allow_unicode=True, width=88)


def _json(data: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(_TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("page.html")
