"""Dominance, the non-dominated points, and the hypervolume: every objective is minimised here."""

from __future__ import annotations

from collections.abc import Sequence

Vector = Sequence[float]


def dominates(a: Vector, b: Vector) -> bool:
    """Whether `a` is at least as good as `b` everywhere and better somewhere."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def non_dominated(points: Sequence[Vector]) -> list[int]:
    """Places of the points that no other dominates; of equal ones the first."""
    kept: list[int] = []
    for i, point in enumerate(points):
        beaten = any(dominates(other, point) for other in points)
        if not beaten and not any(tuple(points[j]) == tuple(point) for j in kept):
            kept.append(i)
    return kept


def hypervolume(points: Sequence[Vector], reference: Vector) -> float:
    """Volume of what the points dominate, up to the reference point: exact, in any number of objectives.

    The points are cut into slabs along the last objective, and each slab's cross-section is a hypervolume of
    one objective less: n log n in two objectives, n^2 log n in three.
    """
    inside = [tuple(p) for p in points if all(x < r for x, r in zip(p, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return float(reference[0] - min(p[0] for p in inside))
    inside.sort(key=lambda p: p[-1])
    if len(reference) == 2:
        return _area(inside, reference)
    volume = 0.0
    front: list[Vector] = []
    for i, point in enumerate(inside):
        front.append(point[:-1])
        front = [front[j] for j in non_dominated(front)]
        top = inside[i + 1][-1] if i + 1 < len(inside) else reference[-1]
        if top > point[-1]:
            volume += (top - point[-1]) * hypervolume(front, reference[:-1])
    return volume


def _area(points: Sequence[Vector], reference: Vector) -> float:
    """Two objectives, points in ascending order of the second."""
    area, width = 0.0, 0.0
    for i, (x, y) in enumerate(points):
        width = max(width, reference[0] - x)
        top = points[i + 1][1] if i + 1 < len(points) else reference[1]
        area += width * (top - y)
    return area


def spread(points: Sequence[Vector], count: int, reference: Vector) -> list[int]:
    """Places of at most `count` points that together dominate the most, taken greedily, the best first."""
    chosen: list[int] = []
    left = non_dominated(points)
    while left and len(chosen) < count:
        base = hypervolume([points[i] for i in chosen], reference)
        gains = {i: hypervolume([points[j] for j in [*chosen, i]], reference) - base for i in left}
        best = max(left, key=lambda i: gains[i])
        if gains[best] <= 0:
            break
        chosen.append(best)
        left.remove(best)
    return chosen
