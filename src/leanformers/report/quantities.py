"""What a point is judged by: the unit, the better direction and the way each number is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard


def _significant(value: float, digits: int = 3) -> str:
    """The number with so many significant digits and no exponent: 0.0123, 1.23, 123, 1,230."""
    if value == 0:
        return "0"
    value = float(f"{value:.{digits - 1}e}")  # 999.96 has four digits once it is rounded
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def _scaled(value: float, units: tuple[str, ...], unit: str = "") -> str:
    """The number in the largest unit of a thousand that leaves at least 1: 43.4 MB."""
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    number = f"{value:.0f}" if step == 0 and float(value).is_integer() else _significant(value)
    return f"{number} {units[step]}{unit}".rstrip()


def seconds(value: float) -> str:
    """A duration: 12.3 ms, 2.10 s, 4 min 10 s, 1 h 5 min."""
    if value < 1:
        return f"{_significant(value * 1000)} ms" if value >= 1e-3 or value == 0 else f"{_significant(value * 1e6)} µs"
    if value < 60:
        return f"{_significant(value)} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def ratio(value: float) -> str:
    """A ratio to the baseline: 0.54×; very small ones keep two significant digits."""
    return f"{value:.2f}×" if value >= 0.1 or value == 0 else f"{_significant(value, 2)}×"


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One axis of the frontier. `unit` names what one number counts; `write` puts it in words."""

    key: str
    title: str
    unit: str
    better: str
    write: Callable[[float], str]


def _quality(value: float) -> str:
    return f"{value:.3f}"


QUANTITIES: Mapping[str, Quantity] = {
    quantity.key: quantity
    for quantity in (
        Quantity(key="quality", title="quality", unit="", better="higher", write=_quality),
        Quantity(key="latency", title="latency", unit="median seconds per batch", better="lower", write=seconds),
        Quantity(
            key="bytes",
            title="bytes on disk",
            unit="of the weight files, as du shows them",
            better="lower",
            write=lambda value: _scaled(value, ("B", "kB", "MB", "GB", "TB")),
        ),
        Quantity(
            key="parameters",
            title="parameters",
            unit="count, tied ones once, zeros too",
            better="lower",
            write=lambda value: _scaled(value, ("", "k", "M", "B")),
        ),
        Quantity(
            key="flops",
            title="FLOPs",
            unit="per real token, multiply-add = 2",
            better="lower",
            write=lambda value: _scaled(value, ("", "k", "M", "G", "T")),
        ),
        Quantity(
            key="memory",
            title="memory",
            unit="bytes of the loaded weights",
            better="lower",
            write=lambda value: _scaled(value, ("B", "kB", "MB", "GB", "TB")),
        ),
        Quantity(
            key="peak_memory",
            title="peak memory",
            unit="bytes while running",
            better="lower",
            write=lambda value: _scaled(value, ("B", "kB", "MB", "GB", "TB")),
        ),
        Quantity(
            key="throughput",
            title="throughput",
            unit="real tokens per second",
            better="higher",
            write=lambda value: _scaled(value, ("", "k", "M", "G")) + " tokens/s",
        ),
    )
}
TABLE = ("quality", "latency", "bytes", "parameters", "flops")
"""The columns of every table, on the terminal and in the report."""


_METRICS = {
    "ndcg@10": "nDCG@10",
    "old_index_ndcg@10": "nDCG@10 on the old index",
    "neighbours@10": "neighbours kept of 10",
    "spearman": "rank correlation",
    "mse": "mean squared error",
    "macro_f1": "macro F1",
}


def metric_title(task: Mapping[str, Any]) -> str:
    """The name of the task's quality, as words: "accuracy", "bits per byte", "nDCG@10"."""
    metric = str(task.get("metric") or "quality")
    return _METRICS.get(metric, metric.replace("_", " "))


def written(key: str, point: Mapping[str, Any]) -> tuple[str, str]:
    """A point's value and ratio as texts, a dash where there is none."""
    value = (point.get("measurement") or {}).get(key)
    share = (point.get("ratios") or {}).get(key)
    return (
        QUANTITIES[key].write(value) if is_number(value) else "–",
        ratio(share) if is_number(share) else "",
    )


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number (and neither None nor a bool)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
