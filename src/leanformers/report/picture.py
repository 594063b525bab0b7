"""The frontier as a still picture: an SVG that follows the reader's light or dark setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from leanformers.errors import LeanError
from leanformers.report import view
from leanformers.report.quantities import QUANTITIES, is_number, metric_title, ratio

WIDTH, HEIGHT = 860, 460
LEFT, RIGHT, TOP, BOTTOM = 66, 840, 44, 400

_STYLE = """
text{font:13px ui-sans-serif,system-ui,-apple-system,"Segoe UI",Inter,Roboto,sans-serif;fill:#66625b}
.paper{fill:#fbfaf7}.grid{stroke:#e6e2d9}.title{fill:#1d1c1a}.name{fill:#1d1c1a;font-weight:600}
.line{fill:none;stroke:#0b7265;stroke-width:2}.area{fill:#0b7265;opacity:.07}.frontier{fill:#0b7265}
.baseline{fill:#1d1c1a}.reference,.warm{fill:#b4560b}.across{stroke:#b4560b}.dominated{fill:#fbfaf7;stroke:#b9b3a7;stroke-width:1.5}
@media (prefers-color-scheme:dark){text{fill:#a5a197}.paper{fill:#141413}.grid{stroke:#31302c}
.title,.name{fill:#eceae4}.line{stroke:#56cdb8}.area,.frontier{fill:#56cdb8}.baseline{fill:#eceae4}
.reference,.warm{fill:#eda55a}.across{stroke:#eda55a}.dominated{fill:#141413;stroke:#5e5b53}}
""".replace("\n", "")


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values inside [low, high], about `count` of them, at 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def staircase(points: Sequence[tuple[float, float, Any]], signs: tuple[int, int]) -> list[tuple[float, float, Any]]:
    """The points (x, y, …) that no other beats on both axes, best x first; signs: -1 where more is better."""
    best, kept = math.inf, []
    for point in sorted(points, key=lambda p: (signs[0] * p[0], signs[1] * p[1])):
        if signs[1] * point[1] < best:
            best = signs[1] * point[1]
            kept.append(point)
    return kept


def picture(data: Mapping[str, Any], x: str = "latency", y: str = "quality") -> str:
    """The SVG of the frontier on two axes, its recipes below; points far from the rest are left out."""
    groups: dict[str, list[tuple[float, float, Mapping[str, Any]]]] = {}
    everyone = [data["baseline"], *data.get("references", ()), *data.get("points", ())]
    for point in everyone:
        measured = point.get("measurement") or {}
        if is_number(measured.get(x)) and is_number(measured.get(y)):
            groups.setdefault(point.get("status", "dominated"), []).append((measured[x], measured[y], point))
    lines = [  # references measured on one axis alone: a line across the other
        (point, axis, measured[key])
        for point in data.get("references", ())
        for measured in [point.get("measurement") or {}]
        for axis, key, other in ((0, x, y), (1, y, x))
        if is_number(measured.get(key)) and not is_number(measured.get(other))
    ]
    main = [p for status in ("frontier", "baseline", "reference") for p in groups.get(status, ())]
    if not main:
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"></svg>'
    spans = [
        _span([(p[0], p[1])[axis] for p in main] + [value for _, where, value in lines if where == axis], key)
        for axis, key in ((0, x), (1, y))
    ]
    signs = (1 if view.better(data, x) == "lower" else -1, 1 if view.better(data, y) == "lower" else -1)

    def place(point: tuple[float, float, Any]) -> tuple[float, float]:
        (x0, x1), (y0, y1) = spans
        across = LEFT + (point[0] - x0) / (x1 - x0) * (RIGHT - LEFT)
        return round(across, 1), round(BOTTOM - (point[1] - y0) / (y1 - y0) * (BOTTOM - TOP), 1)

    def inside(point: tuple[float, float, Any]) -> bool:
        return all(low <= value <= high for value, (low, high) in zip(point[:2], spans, strict=True))

    legend = _legend(data)
    height = HEIGHT + (24 * len(legend) + 14 if legend else 0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(_caption(data, x, y))}"><style>{_STYLE}</style>',
        f'<rect class="paper" width="{WIDTH}" height="{height}" rx="10"/>',
    ]
    parts += _axes(data, (x, y), spans, signs, place)
    stairs = staircase([*groups.get("frontier", ()), *groups.get("baseline", ())], signs)
    if stairs:
        edge_x, edge_y = (RIGHT if signs[0] > 0 else LEFT), (BOTTOM if signs[1] < 0 else TOP)
        corners = [place(point) for point in stairs]
        path = f"M{corners[0][0]} {corners[0][1]}" + "".join(f"H{px}V{py}" for px, py in corners[1:]) + f"H{edge_x}"
        parts.append(f'<path class="area" d="{path}V{edge_y}H{corners[0][0]}Z"/>')
        parts.append(f'<path class="line" d="{path}"/>')
    for point, axis, value in lines:
        across, up = place((value, spans[1][0], point)) if axis == 0 else place((spans[0][0], value, point))
        ends = (
            f'x1="{across}" x2="{across}" y1="{TOP}" y2="{BOTTOM}"'
            if axis == 0
            else f'x1="{LEFT}" x2="{RIGHT}" y1="{up}" y2="{up}"'
        )
        told = escape(f"{point['name']} {QUANTITIES[(x, y)[axis]].write(value)}")
        at = f'x="{across + 6}" y="{TOP + 12}"' if axis == 0 else f'x="{LEFT + 6}" y="{up - 6}"'
        parts.append(f'<line class="across" {ends}/><text class="name warm" {at}>{told}</text>')
    for point in filter(inside, groups.get("dominated", ())):
        parts.append('<circle class="dominated" cx="{}" cy="{}" r="4"/>'.format(*place(point)))
    for px, py in map(place, groups.get("reference", ())):
        parts.append(f'<path class="reference" d="M{px} {py - 7}l7 12.5h-14z"/>')
    for px, py in map(place, groups.get("frontier", ())):
        parts.append(f'<circle class="frontier" cx="{px}" cy="{py}" r="6"/>')
    for px, py in map(place, groups.get("baseline", ())):
        parts.append(f'<path class="baseline" d="M{px} {py - 7.5}l7.5 7.5l-7.5 7.5l-7.5 -7.5z"/>')
    parts += _labels(groups, place, x, signs, view.letters(data))
    return "\n".join([*parts, *legend, "</svg>"]) + "\n"


def write_picture(data: Mapping[str, Any], path: str | Path, x: str = "latency", y: str = "quality") -> Path:
    """Write the picture as an SVG file."""
    for key in (x, y):
        if key not in QUANTITIES:
            raise LeanError(f"there is no axis {key!r}: choose of {', '.join(QUANTITIES)}")
    Path(path).write_text(picture(data, x, y), "utf-8")
    return Path(path)


def _span(values: Sequence[float], key: str) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low or abs(high) or 1.0) * 0.08
    start = 0.0 if key != "quality" and 0 <= low < 0.35 * high else low - pad
    return max(start, 0.0) if low >= 0 else start, high + pad


def _axes(data: Any, keys: Any, spans: Any, signs: Any, place: Any) -> list[str]:
    parts = []
    for value in ticks(spans[1][0], spans[1][1], 6):
        _, py = place((spans[0][0], value))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{py}" y2="{py}"/>')
        parts.append(f'<text x="{LEFT - 10}" y="{py + 4.5}" text-anchor="end">{_tick(keys[1], value)}</text>')
    for value in ticks(spans[0][0], spans[0][1], 7):
        px, _ = place((value, spans[1][0]))
        parts.append(f'<text x="{px}" y="{BOTTOM + 20}" text-anchor="middle">{_tick(keys[0], value)}</text>')
    titles = [metric_title(data.get("task", {})) if key == "quality" else QUANTITIES[key].title for key in keys]
    units = [f", {QUANTITIES[key].unit}" if QUANTITIES[key].unit else "" for key in keys]
    up, across = ("↓" if signs[1] > 0 else "↑"), ("←" if signs[0] > 0 else "→")
    parts.append(
        f'<text x="12" y="24"><tspan class="title">{escape(titles[1])}</tspan>{escape(units[1])} {up} better</text>'
    )
    parts.append(
        f'<text x="{RIGHT}" y="{HEIGHT - 14}" text-anchor="end">'
        f'<tspan class="title">{escape(titles[0])}</tspan>'
        f"{escape(units[0])} {across} better</text>"
    )
    return parts


def _tick(key: str, value: float) -> str:
    """A tick's text without the zeros that a measured number needs: 20 ms, not 20.0 ms."""
    text = QUANTITIES[key].write(value)
    number, _, unit = text.partition(" ")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{number} {unit}".strip()


def _labels(
    groups: Mapping[str, Any], place: Any, x: str, signs: tuple[int, int], letters: Mapping[str, str]
) -> list[str]:
    """Names beside points, on the better (free) side if there is room; a name without room is left out."""
    out, back = ("end", "start") if signs[0] > 0 else ("start", "end")
    side, up, down = (-1 if signs[0] > 0 else 1), (-11 if signs[1] < 0 else 21), (21 if signs[1] < 0 else -11)
    places = (
        (7 * side, up, out), (13 * side, 4.5, out), (0, up, "middle"), (-7 * side, up, back),
        (7 * side, down, out), (0, down, "middle"), (-7 * side, down, back), (-13 * side, 4.5, back),
    )  # fmt: skip
    marks = [(status, p, *place(p)) for status in ("baseline", "reference", "frontier") for p in groups.get(status, ())]
    taken = [(px - 8, py - 8, px + 8, py + 8) for _, _, px, py in marks]
    parts = []
    for status, point, px, py in marks:
        share = (point[2].get("ratios") or {}).get(x)
        name = letters.get(str(point[2]["name"])) or str(point[2]["name"])
        if status == "frontier" and is_number(share):
            name += f"  {ratio(share)}"
        wide = 7.6 * len(name) + 6
        for dx, dy, anchor in places:
            left = px + dx - {"start": 0.0, "end": wide, "middle": wide / 2}[anchor]
            box = (left, py + dy - 12, left + wide, py + dy + 3)
            free = box[0] >= LEFT and box[2] <= WIDTH - 8 and box[1] >= 28 and box[3] <= BOTTOM
            own = (px - 8, py - 8, px + 8, py + 8)
            if free and all(
                box[2] < t[0] or box[0] > t[2] or box[3] < t[1] or box[1] > t[3] for t in taken if t != own
            ):
                taken.append(box)
                warm = " warm" if status == "reference" else ""
                parts.append(
                    f'<text class="name{warm}" x="{px + dx}" y="{py + dy}" text-anchor="{anchor}">{escape(name)}</text>'
                )
                break
    return parts


def _legend(data: Mapping[str, Any]) -> list[str]:
    """One line per point of the frontier: its letter, its methods, its ratios."""
    marks = view.letters(data)
    lines: list[str] = []
    for point in data.get("points", ()):
        letter = marks.get(str(point["name"]))
        if letter is None:
            continue
        shares = point.get("ratios") or {}
        told = [f"{ratio(shares[key])} {key}" for key in ("quality", "latency", "bytes") if is_number(shares.get(key))]
        what = view.summary(point) or str(point["name"])
        y = HEIGHT + 14 + 24 * len(lines)
        lines.append(
            f'<text class="name" x="{LEFT - 40}" y="{y}">{letter}</text>'
            f'<text x="{LEFT - 12}" y="{y}"><tspan class="title">{escape(what)}</tspan></text>'
            f'<text x="{RIGHT}" y="{y}" text-anchor="end">{escape(" · ".join(told))}</text>'
        )
    return lines


def _caption(data: Mapping[str, Any], x: str, y: str) -> str:
    task = data.get("task", {})
    what = metric_title(task) if y == "quality" else QUANTITIES[y].title
    name = task.get("name") or task.get("kind")
    return f"{what} against {QUANTITIES[x].title} of {data.get('model')} on {name}"
