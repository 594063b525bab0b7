"""The report of a run: one self-contained HTML page, and the picture of its frontier.

Input is the plain mapping that a run keeps as `frontier.json` (JSON types only), schema 1::

    schema        1
    name          str       the run's name, e.g. its folder's
    model         str       the model as the user named it
    task          {"name", "kind", "metric", "better": "higher"|"lower", "rows": {"train": int, …}}
    goals         [str]     e.g. ["latency<=0.5x", "quality>=0.99x"]
    objectives    [str]     optional: the measures by which points dominate each other
    skipped       {method: why it was left out}, optional
    status        "complete" | "interrupted" | "running"
    seed, seconds, created (ISO 8601), command: optional
    runtime       str       optional: where the search measured, and the baseline that ratios are to
    best          str|None  name of the point to take: the one that meets the goals best
    baseline      Point     the model as it is (or tuned, where the task needs it)
    references    [Point]   what one would try first, e.g. TF-IDF with logistic regression
    points        [Point]   every recipe that was tried
    environment   {str: str | number | list | mapping}, as `leanformers.measure.environment` gives it

    Point: {
      name          str
      status        "baseline" | "reference" | "frontier" | "dominated" | "estimated" | "failed"
      recipe        {"steps": [{"method": slug, **settings}], …}   or the list of steps alone, or None
      measurement   {"quality", "metrics", "parameters", "bytes", "memory", "flops", "latency", "latency_p95",
                     "throughput", "peak_memory", "runtime"}: numbers or None; None where nothing was measured
      ratios        {same keys: value / baseline}; the quality's is above 1 where it is better
      tier          "stock" | "lean" | "runtime" | None
      folder        str|None  relative to the report, or absolute
      reason        str|None  why it failed, why it was not trained, or which point beats it
      meets         bool|None whether it meets every goal
    }

Missing optional fields are left out of the page; nothing is invented for them.
"""

from __future__ import annotations

from leanformers.report.page import render, write
from leanformers.report.picture import picture, write_picture

__all__ = ["picture", "render", "write", "write_picture"]
