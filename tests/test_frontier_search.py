"""The course of a search: what it finds, what it survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

import frontier_fake as fake
from leanformers import folders
from leanformers.errors import LeanError
from leanformers.frontier import Space, hypervolume
from leanformers.frontier.conclude import ASIDE, beside, points_of, write_points
from leanformers.frontier.result import Frontier, Point, minimised
from leanformers.frontier.store import Store
from leanformers.measure import Measurement
from leanformers.methods import base
from leanformers.recipe import Recipe, key_of


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where the system has that: sqlite waits for the disk at each of a trial's thirty commits."""
    place = Path("/dev/shm")
    if not os.access(place, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


@pytest.fixture
def infos(monkeypatch):
    monkeypatch.setattr(base, "_registry", {})
    monkeypatch.setattr("leanformers.methods._registry", base._registry)
    return fake.register()


def concluded(search, bench):
    baseline = bench.compare([])["baseline"]
    first, tried = points_of(search, bench, Recipe(model="some/model", task="sentiment"), baseline)
    written = write_points(search.folder, [p for p in tried if p.status == "frontier"], {"kind": "embedding"})
    others = [p for p in tried if p.status != "frontier"]
    return Frontier(
        folder=search.folder,
        model="some/model",
        task={"name": "sentiment", "kind": "text-classification", "metric": "accuracy", "better": "higher"},
        goals=search.goals,
        objectives=search.objectives,
        baseline=first,
        references=(),
        points=tuple(written),
        trials=tuple(others),
        skipped={},
        status="complete",
        seed=0,
        seconds=1.0,
        created="2026-01-01T00:00:00+00:00",
        environment={},
    )


def test_a_search_ends_with_points_for_every_goal(tmp_path, infos):
    search, bench = fake.search_in(tmp_path / "run", infos)
    search.explore()
    search.confirm()
    trainings = {search._prefix(steps) for what, steps in bench.asked if what == "full"} - {""}
    assert 1 <= len(trainings) <= 3
    keys = [key_of(steps) for what, steps in bench.asked if what == "estimate"]
    assert len(keys) == len(set(keys)) == 20
    frontier = concluded(search, bench)
    points = frontier.points
    assert len(points) >= 3
    assert any(p.ratios["latency"] <= 0.6 and p.ratios["quality"] >= 0.98 for p in points)
    assert any(p.ratios["bytes"] <= 0.3 and p.ratios["quality"] >= 0.98 for p in points)
    assert frontier.best in points and frontier.hypervolume() > 0
    for point in points:
        folder = search.folder / "points" / point.name
        assert {"measurement.json", "README.md", "model.safetensors"} <= {e.name for e in folder.iterdir()}
        assert not (folder / "steps.json").exists()
        assert "The same recipe elsewhere" not in (folder / "README.md").read_text()  # it was tried in one runtime
    data = frontier.to_json()
    json.dumps(data, allow_nan=False)
    assert data["points"][0]["folder"] == f"points/{points[0].name}" and data["best"] == frontier.best.name
    assert all(p["reason"] for p in data["points"] if p["status"] != "frontier")
    assert {p["status"] for p in data["points"]} <= {"frontier", "dominated", "estimated", "failed"}


def test_what_was_timed_at_another_hour_stands_on_the_scale_of_the_baseline():
    def point(name, **found):
        measured = Measurement(parameters=1, bytes=1, memory=1, **found)
        return Point(name=name, status="estimated", measurement=measured, ratios={"latency": 0.5})

    busy = point("baseline", latency=0.2, throughput=100.0)
    found = beside(point("early", latency=0.05, latency_p95=0.06, throughput=300.0), busy).measurement
    assert (found.latency, found.latency_p95, found.throughput) == pytest.approx((0.1, 0.12, 150.0))
    untimed = point("TF-IDF")
    assert beside(untimed, busy) is untimed


def test_what_only_the_validation_rows_know_is_not_on_the_frontier(tmp_path, infos, monkeypatch):
    search, bench = fake.search_in(tmp_path, infos, trials=12)
    search.explore()
    search.confirm()
    search.effort = fake.Effort(points=2)
    compared, compare = [], bench.compare
    monkeypatch.setattr(bench, "compare", lambda names: compared.extend(names) or compare(names))
    _, tried = points_of(search, bench, Recipe(model="some/model", task="sentiment"), None)
    aside = [point for point in tried if point.reason == ASIDE]
    assert len(compared) == 2 and len(search.all_saved()) > 2
    assert {point.name for point in aside} == set(search.all_saved()) - set(compared)
    assert all(point.status == "estimated" for point in aside)


def test_the_same_again_does_nothing_twice_and_more_trials_go_on(tmp_path, infos):
    search, _ = fake.search_in(tmp_path, infos, trials=8, finalists=1)
    search.explore()
    search.confirm()
    again, bench = fake.search_in(tmp_path, infos, trials=8, finalists=1)
    again.explore()
    again.confirm()
    assert bench.asked == []
    more, bench = fake.search_in(tmp_path, infos, trials=11, finalists=1)
    more.explore()
    assert Counter(what for what, _ in bench.asked) == {"estimate": 3}
    keys = [record.key for record in more.store.records()]
    assert len(set(keys)) == len(keys) == 11


def test_failing_trials_are_recorded_and_the_search_goes_on(tmp_path, infos):
    errors = iter([MemoryError(), RuntimeError("out of memory"), FloatingPointError("the loss is NaN"),
                   LeanError("method 'x' does not suit this model"), KeyError("a bug")])  # fmt: skip

    def trouble(what, steps):
        error = next(errors, None)
        if error is not None:
            raise error

    search, bench = fake.search_in(tmp_path, infos, trials=10, finalists=1, trouble=trouble)
    search.explore()
    records = search.store.records()
    assert Counter(record.state for record in records) == {"done": 5, "failed": 5}
    reasons = [record.reason for record in records if record.state == "failed"]
    assert reasons[0] == "not enough memory" and "not enough memory" in reasons[1]
    assert reasons[2:4] == ["the loss is NaN", "method 'x' does not suit this model"] and "KeyError" in reasons[4]
    search.confirm()
    failed = [p for p in concluded(search, bench).trials if p.status == "failed"]
    assert {p.reason for p in failed} == set(reasons)


def test_a_training_that_fails_in_full_makes_room_for_another(tmp_path, infos):
    calls = []

    def trouble(what, steps):
        if what == "full" and not calls:
            calls.append(steps)
            raise FloatingPointError("the loss became NaN in step 7")

    search, bench = fake.search_in(tmp_path, infos, trials=9, finalists=2, trouble=trouble)
    search.explore()
    search.confirm()
    frontier = concluded(search, bench)
    assert frontier.points
    assert any("NaN in step 7" in (p.reason or "") for p in frontier.trials if p.status == "failed")


def test_interruption_gives_the_trial_back(tmp_path, infos):
    def trouble(what, steps):
        if len(bench.asked) == 5:
            raise KeyboardInterrupt

    search, bench = fake.search_in(tmp_path, infos, trials=8, trouble=trouble)
    with pytest.raises(KeyboardInterrupt):
        search.explore()
    assert Counter(r.state for r in search.store.records()) == {"done": 4, "cut off": 1}
    cut = next(r for r in search.store.records() if r.state == "cut off")
    frontier = concluded(search, bench)  # nothing was run in full yet
    assert frontier.points == () and len(frontier.trials) == 4 and frontier.best is None
    search.explore()
    records = search.store.records()
    assert sum(r.state == "done" for r in records) == 8
    assert any(r.key == cut.key and r.state == "done" for r in records)


def test_a_full_disk_stops_with_one_sentence_and_no_half_point(tmp_path, infos):
    def trouble(what, steps):
        if what == "full":
            raise OSError(28, "No space left on device")

    search, _ = fake.search_in(tmp_path, infos, trials=6, trouble=trouble)
    search.explore()
    with pytest.raises(LeanError, match="full: free some space"), folders.guarding_disk(tmp_path):
        search.confirm()
    assert not any(entry.is_dir() for entry in (tmp_path / "finals").iterdir())
    with pytest.raises(LeanError, match="disk that holds"), folders.whole(tmp_path / "point") as partial:
        (partial / "half").write_text("x")
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert not list(tmp_path.glob("*point*")) and not list(tmp_path.glob(".point*"))


def test_time_limits_end_the_search(tmp_path, infos):
    search, bench = fake.search_in(tmp_path, infos, trials=500, minutes=0.02, slow=0.05)
    search.explore()
    search.confirm()
    assert 1 <= len(bench.asked) < 30


# -- processes ------------------------------------------------------------------------------------------
def start(folder, trials, slow):
    source = Path(fake.__file__)
    path = os.pathsep.join([str(source.parent), str(source.parents[1] / "src")])
    command = [sys.executable, str(source), str(folder), str(trials), str(slow)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})


def logged(folder):
    path = folder / "log.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def wait_for(condition, process=None, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and (process is None or process.poll() is None), "nothing happened"
        time.sleep(0.02)


def test_killed_at_any_moment_it_goes_on_and_loses_the_trial_in_hand_alone(tmp_path, infos):
    kills = 0
    for wanted in (2, 7):
        process = start(tmp_path, 8, 0.15)
        wait_for(lambda wanted=wanted: len(logged(tmp_path)) >= wanted, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert start(tmp_path, 8, 0.0).wait(60) == 0
    search, bench = fake.search_in(tmp_path, infos, trials=8)
    search.explore()
    search.confirm()
    assert bench.asked == []  # nothing was left to do
    asked = Counter((what, key_of(steps)) for what, steps in logged(tmp_path))
    assert sum(what == "estimate" for what, _ in asked) == 8
    assert sum(asked.values()) - len(asked) <= kills  # each kill costs one repetition at most
    assert Counter(r.state for r in search.store.records())["done"] == 8


def test_a_recipe_that_kills_its_process_is_given_up(tmp_path, infos):
    space = Space([info for info in infos if info.slug == "fake-int8"])  # it has two recipes
    taken = Counter()
    for _ in range(20):
        store = Store(tmp_path, space, ("quality", "bytes"), seed=0)
        found = store.next(wanted=99)
        if found is None:
            break
        taken[key_of(found[1])] += 1
        store._held[found[0]].release()  # what the system does when the process ends
    assert sorted(taken.values()) == [3, 3]
    failed = [record for record in store.records() if record.state == "failed"]
    assert len(failed) == 2 and all("3 times" in record.reason for record in failed)


def test_two_processes_share_a_study(tmp_path):
    both = [start(tmp_path, 6, 0.1), start(tmp_path, 6, 0.1)]
    assert [process.wait(90) for process in both] == [0, 0]
    asked = Counter((what, key_of(steps)) for what, steps in logged(tmp_path))
    estimates = [count for (what, _), count in asked.items() if what == "estimate"]
    assert estimates == [1] * 6


# -- whether it is worth it ---------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_twenty_trials_are_worth_forty_random_recipes(tmp_path, infos, seed):
    import optuna

    search, _ = fake.search_in(tmp_path, infos, seed=seed)
    search.explore()
    corner = (-0.9, 1.1, 1.1)

    def volume(recipes):
        ratios = [dict(zip(search.objectives, fake.outcome(steps, 1.0), strict=True)) for steps in recipes]
        return hypervolume([minimised(one, search.objectives) for one in ratios], corner)

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    space, drawn = Space(infos), []
    while len(drawn) < 40:
        steps = space.suggest(study.ask())
        if steps and steps not in drawn:
            drawn.append(steps)
    assert volume([record.steps for record in search.store.records()]) >= volume(drawn)
