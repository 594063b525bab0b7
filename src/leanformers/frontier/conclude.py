"""The end of a search: the last measurement, the non-dominated points as folders, a record of the rest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from leanformers import folders
from leanformers.frontier.baseline import BASELINE, SOURCE
from leanformers.frontier.bench import RESULT, Bench, Result
from leanformers.frontier.card import licence_of, model_card
from leanformers.frontier.deployed import export_of, exported, is_deployed, source_of
from leanformers.frontier.goals import Goal
from leanformers.frontier.pareto import dominates, non_dominated, spread
from leanformers.frontier.result import Frontier, Point, minimised
from leanformers.frontier.search import Search
from leanformers.frontier.select import KEPT, reference_of
from leanformers.frontier.space import Steps, name_of, trained_prefix
from leanformers.recipe import Recipe

if TYPE_CHECKING:
    from leanformers.measure import Measurement

ASIDE = "on the validation rows other points were at least as good, so the test rows were spared it"
_OWN = {"steps.json", RESULT}  # of the search, not of a point


def points_of(search: Search, bench: Bench, recipe: Recipe, baseline: Measurement) -> tuple[Point, list[Point]]:
    """The baseline and all that was tried, measured once more side by side where it was run in full.

    recipe: the baseline's, to which a point's steps are added. A second Ctrl-C skips the measurement; the
    points then carry what was measured on the validation rows while the search went.
    """
    saved = search.all_saved()
    results = {name: search.saved(steps) for name, steps in saved.items()}
    known = {name: result for name, result in results.items() if result is not None}
    names = list(known)
    vectors = [minimised(known[name].ratios, search.objectives) for name in names]
    corner = reference_of(search.goals, search.objectives, KEPT)
    kept = spread(vectors, search.effort.points, corner) or non_dominated(vectors)[: search.effort.points]
    compared = _compare(bench, [names[i] for i in kept], baseline)
    files = export_of(search.folder, BASELINE, compared[BASELINE].runtime)
    first = Point(
        name=BASELINE,
        status=BASELINE,
        recipe=recipe,
        measurement=compared[BASELINE],
        ratios=compared[BASELINE].ratios(compared[BASELINE]),
        folder=files or search.folder / BASELINE,
        tier="runtime" if files else _tier_of(search.folder / BASELINE),
    )
    found = [_measured_point(search, recipe, name, saved[name], known[name], compared) for name in names]
    found += [
        _deployed_point(search, name, measured, compared[BASELINE], found, first)
        for name, measured in compared.items()
        if is_deployed(name)
    ]
    found = [point if point.name in compared else beside(point, first) for point in found]
    # What only the validation rows know is not ranked beside what the test rows know.
    aside = [] if len(compared) == 1 else [point for point in found if point.name not in compared]
    found = _ranked([point for point in found if point not in aside], first, search.objectives)
    aside = [replace(point, status="estimated", reason=ASIDE) for point in aside]
    return first, [*found, *aside, *(beside(point, first) for point in _others(search, recipe, set(saved)))]


def beside(point: Point, baseline: Point) -> Point:
    """A point that was timed at another hour than the baseline, as it would have been beside it.

    What was measured is the ratio to the baseline in the same rounds; a machine that is busier or cooler by then would
    put the seconds of both on different scales, in tables and plots.
    """
    measured, then = point.measurement, baseline.measurement
    if measured is None or then is None or not measured.latency or not then.latency or "latency" not in point.ratios:
        return point
    scale = point.ratios["latency"] * then.latency / measured.latency
    slowest, rate = measured.latency_p95, measured.throughput
    return replace(
        point,
        measurement=replace(
            measured,
            latency=measured.latency * scale,
            latency_p95=None if slowest is None else slowest * scale,
            throughput=None if rate is None else rate / scale,
        ),
    )


def _compare(bench: Bench, names: Sequence[str], baseline: Measurement) -> dict[str, Measurement]:
    if not names:
        return {BASELINE: baseline}
    try:
        return bench.compare(names)
    except KeyboardInterrupt:
        return {BASELINE: baseline}


def _measured_point(
    search: Search,
    recipe: Recipe,
    name: str,
    steps: Steps,
    result: Result,
    compared: Mapping[str, Measurement],
) -> Point:
    from leanformers.measure import Measurement

    measured = compared.get(name)
    ratios = measured.ratios(compared[BASELINE]) if measured is not None else result.ratios
    measured = measured if measured is not None else Measurement.from_json(result.measurement)
    return Point(
        name=name,
        status="dominated",
        recipe=replace(recipe, steps=(*recipe.steps, *steps)),
        measurement=measured,
        ratios=ratios,
        folder=export_of(search.folder, name, measured.runtime) or search.finals / name,
        tier=result.tier,
        meets=meets(search.goals, measured, ratios),
        seconds=result.seconds,
    )


def _deployed_point(
    search: Search, key: str, measured: Measurement, baseline: Measurement, points: Sequence[Point], first: Point
) -> Point:
    """A point, or the baseline, as it runs in another runtime: its own folder and figures, the same recipe."""
    source = next(point for point in (first, *points) if point.name == source_of(key))
    ratios = measured.ratios(baseline)
    return replace(
        source,
        name=key,
        status="dominated",
        measurement=measured,
        ratios=ratios,
        folder=exported(search.folder, key),
        tier="runtime",
        meets=meets(search.goals, measured, ratios),
    )


def _ranked(points: Sequence[Point], baseline: Point, objectives: Sequence[str]) -> list[Point]:
    """The points with their status: on the frontier, or dominated and by which one."""
    everyone = [baseline, *points]
    vectors = [minimised(point.ratios, objectives, digits=2) for point in everyone]
    winners = set(non_dominated(vectors))
    ranked = []
    for place, point in enumerate(points, start=1):
        if place in winners:
            ranked.append(replace(point, status="frontier"))
            continue
        better = [i for i in sorted(winners) if dominates(vectors[i], vectors[place]) or vectors[i] == vectors[place]]
        by = everyone[better[0]].name if better else "another point"
        ranked.append(replace(point, reason=f"{by} is at least as good in {_list(objectives)}"))
    return ranked


def _others(search: Search, recipe: Recipe, saved: set[str]) -> list[Point]:
    """Recipes that were estimated alone, and those that failed."""
    from leanformers.measure import Measurement

    found = []
    for record in search.store.records():
        name = name_of(record.steps, record.key)
        if name in saved or record.state == "running" or (record.state == "cut off"):
            continue
        point = Point(name=name, status="failed", recipe=replace(recipe, steps=(*recipe.steps, *record.steps)))
        failure = search.failure(record.steps)
        if record.result is None:
            found.append(replace(point, reason=record.reason or "it failed"))
            continue
        result = Result(**record.result)
        trains = trained_prefix(search.space.infos, record.steps) > 0
        reason = (
            "not trained in full: its estimate, after a short training, promised less than those that were"
            if trains
            else "not kept: its estimate adds little to the points that were"
        )
        found.append(
            replace(
                point,
                status="estimated" if failure is None else "failed",
                measurement=Measurement.from_json(result.measurement),
                ratios=result.ratios,
                tier=result.tier,
                seconds=result.seconds,
                reason=reason if failure is None else f"trained in full it failed: {failure}",
            )
        )
    return found


def meets(goals: Sequence[Goal], measured: Measurement, ratios: Mapping[str, float]) -> bool | None:
    """Whether every goal is met; None where there are none."""
    return all(goal.met(measured.to_json(), ratios) for goal in goals) if goals else None


def _siblings(point: Point, points: Sequence[Point]) -> list[Point]:
    """The same recipe in other runtimes."""
    mine = source_of(point.name)
    others = [p for p in points if p.name != point.name and p.measurement is not None]
    return [p for p in others if source_of(p.name) == mine]


def write_points(
    folder: Path, points: Sequence[Point], task: Mapping[str, Any], everyone: Sequence[Point] | None = None
) -> list[Point]:
    """Put the frontier's checkpoints into `points/`, whole or not at all, and take others out of it.

    The files are hard links to those in `finals/` where the file system has them. everyone: all that was tried, for
    the cards, which show a recipe's other runtimes.
    """
    from leanformers.report.snippets import load_lines

    place = folder / "points"
    place.mkdir(parents=True, exist_ok=True)
    written = []
    everyone = list(points) if everyone is None else everyone
    licence = licence_of(str(points[0].recipe.model)) if points and points[0].recipe else None
    for point in points:
        target = place / point.name
        measured = point.measurement
        assert point.folder is not None and measured is not None
        with folders.whole(target) as partial:
            shutil.copytree(
                point.folder,
                partial,
                ignore=lambda _, names: [name for name in names if name in _OWN],
                copy_function=_link,
                dirs_exist_ok=True,
            )
            folders.write_json(partial / "measurement.json", measured.to_json())
            if point.recipe is not None and not (partial / "recipe.yaml").is_file():  # an export holds none
                point.recipe.save(partial / "recipe.yaml")
            point = replace(point, folder=target)
            lines = load_lines(str(target), str(task.get("kind", "")), point.tier, measured.runtime)
            folders.write_text(
                partial / "README.md", model_card(point, task, lines, _siblings(point, everyone), licence)
            )
        written.append(point)
    for entry in place.iterdir():
        if entry.name not in {point.name for point in points}:
            shutil.rmtree(entry, ignore_errors=True)
    return written


def write(frontier: Frontier) -> None:
    """Write frontier.json and the report."""
    from leanformers.report import write as write_report

    data = frontier.to_json()
    with FileLock(frontier.folder / "locks" / "report.lock"):
        folders.write_json(frontier.folder / "frontier.json", data)
        with folders.guarding_disk(frontier.folder):
            write_report(json.loads((frontier.folder / "frontier.json").read_text()), frontier.folder / "report.html")


def reference_points(folder: Path, task: Any, baseline: Measurement, limit: int | None, seed: int) -> list[Point]:
    """TF-IDF with a linear model, where that can do the task: fitted once and kept."""
    from leanformers.measure import Measurement
    from leanformers.tasks import tfidf

    path = folder / "reference.json"
    if not path.is_file():
        found = tfidf(task, limit=limit, seed=seed)
        record = None
        if found is not None:
            measured = Measurement(
                parameters=found.parameters,
                bytes=found.bytes,
                memory=found.bytes,
                quality=found.quality,
                metrics=found.metrics,
                metric=task.metric,
                better=task.better,
                runtime="scikit-learn",
            )
            record = {"name": found.name, "measurement": measured.to_json()}
        folders.write_json(path, record)
    record = json.loads(path.read_text())
    if record is None:
        return []
    measured = Measurement.from_json(record["measurement"])
    return [Point(name=record["name"], status="reference", measurement=measured, ratios=measured.ratios(baseline))]


def source_points(folder: Path, recipe: Recipe, baseline: Measurement) -> list[Point]:
    """The model that a baseline in another runtime was exported from, as it runs in torch."""
    from leanformers.measure import Measurement

    path = folder / BASELINE / SOURCE
    if not path.is_file():
        return []
    measured = Measurement.from_json(json.loads(path.read_text()))
    return [
        Point(
            name=f"{BASELINE} in torch",
            status="reference",
            recipe=recipe,
            measurement=measured,
            ratios=measured.ratios(baseline),
            folder=folder / BASELINE,
            tier=_tier_of(folder / BASELINE),
        )
    ]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _tier_of(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    method = (config.get("quantization_config") or {}).get("quant_method")
    return "lean" if method == "leanformers" else "stock"


def _list(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
