"""The bounds of a search: how many models are in memory at once, and the time that was given."""

from __future__ import annotations

import gc
import importlib
import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import frontier_fake as fake
from leanformers.frontier import shelf, slim
from leanformers.frontier.bench import Workbench
from leanformers.frontier.clock import LEAST, Clock, Stop, cut, fitting
from leanformers.methods import Subject
from leanformers.tasks import load
from test_frontier_slim import own_task, source  # noqa: F401

# -- memory -----------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch):
    """Bytes that are free, as the tests set them."""
    free = {"bytes": 10**12}
    monkeypatch.setattr("leanformers.training.fisher.free_memory", lambda device: free["bytes"])
    return free


@pytest.fixture(scope="module")
def subject(source):  # noqa: F811
    task = own_task(source)
    torch.manual_seed(0)
    model, tokenizer = load(source / "model", task)
    return Subject(model=model, tokenizer=tokenizer, task=task, trained_examples=7)


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("room", [True, False])
def test_a_kept_model_comes_back_as_it_was(room, subject, memory, tmp_path):
    import copy

    memory["bytes"] = 10**12 if room else 0
    kept = shelf.Shelf(tmp_path, lambda folder: load(folder, subject.task, "auto"))
    one = replace(subject, model=copy.deepcopy(subject.model))
    work = kept.put("key", one)
    assert (work is one) == (not room)  # what was written is not copied as well
    with torch.no_grad():
        for parameter in work.model.parameters():
            parameter.zero_()
    again = kept.take("key")
    assert same(again.model, subject.model) and again.model is not work.model and again.trained_examples == 7
    assert again.tokenizer.get_vocab() == subject.tokenizer.get_vocab() and kept.take("other") is None
    assert bool(list(tmp_path.glob(".draft-*"))) == (not room)
    kept.close()
    assert not list(tmp_path.glob(".draft-*")) and kept.take("key") is None


def test_models_go_to_files_once_room_is_short_and_the_oldest_goes_for_good(subject, memory, tmp_path):
    import copy

    kept = shelf.Shelf(tmp_path, lambda folder: load(folder, subject.task, "auto"))
    held = []
    for key in "abcd":
        one = replace(subject, model=copy.deepcopy(subject.model))
        held.append(weakref.ref(one.model))
        kept.put(key, one)
    del one
    gc.collect()
    assert [ref() is not None for ref in held] == [False, True, True, True] and kept.take("a") is None
    memory["bytes"] = 0
    kept.make_room(subject.model)
    gc.collect()
    assert not any(ref() for ref in held)
    assert all(same(kept.take(key).model, subject.model) for key in "bcd")


def test_a_full_disk_costs_what_is_kept_and_not_the_search(subject, memory, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    memory["bytes"] = 0
    monkeypatch.setattr(shelf, "save_checkpoint", full)
    kept = shelf.Shelf(tmp_path, load)
    assert kept.put("key", subject) is subject and kept.take("key") is None
    assert not list(tmp_path.glob(".draft-*"))


def test_as_many_models_are_loaded_together_as_half_the_memory_holds(memory):
    sizes = {"a": 30, "b": 30, "c": 50, "d": 90, "e": 10}
    memory["bytes"] = 10**9
    assert shelf.groups(sizes, "cpu") == [["a", "b", "c", "d", "e"]]
    memory["bytes"] = 140
    assert shelf.groups(sizes, "cpu") == [["a", "b"], ["c"], ["d"], ["e"]]
    memory["bytes"] = 0
    assert shelf.groups(sizes, "cpu") == [[name] for name in sizes] and shelf.groups({}, "cpu") == []


@pytest.mark.parametrize("frozen", [False, True])
def test_collections_pass_over_what_was_there_and_the_callers_own_stay_frozen(frozen):
    gc.unfreeze()
    there = [[] for _ in range(100)]

    def collected_over():
        """How many of those a collection would walk: the frozen are not listed."""
        walked = {id(one) for one in gc.get_objects()}
        return sum(id(one) in walked for one in there)

    if frozen:
        gc.freeze()
    before = collected_over()
    assert before == (0 if frozen else 100)
    with shelf.settled():
        assert collected_over() == 0
        cycle = torch.nn.Identity()
        cycle.itself = [cycle]
        gone = weakref.ref(cycle)
        del cycle
        gc.collect()
        assert gone() is None  # what is made inside is collected
    assert collected_over() == before
    gc.unfreeze()


SETTINGS = {
    "goals": ["latency<=0.9x"],
    "methods": ["drop-layers", "distillation", "quantization"],
    "tune": {"epochs": 1.0},
    "trials": 4,
    "finalists": 1,
    "estimate": 32,
    "validation": 20,
    "test": 20,
    "runtime": "torch",
    "progress": False,
}


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(Workbench, "quick_seconds", 0.02)
    monkeypatch.setattr(Workbench, "last_seconds", 0.1)
    gc.freeze()  # so that collecting is quick
    yield
    gc.unfreeze()


def estimated(folder):
    """The quality of each recipe's estimate, by its steps."""
    import optuna

    (study,) = optuna.get_all_study_summaries(f"sqlite:///{folder / 'study.db'}")
    told = optuna.load_study(study_name=study.study_name, storage=f"sqlite:///{folder / 'study.db'}").trials
    attributes = [trial.user_attrs for trial in told if "result" in trial.user_attrs]
    return {one["steps"]: json.loads(one["result"])["measurement"]["metrics"] for one in attributes}


def test_beside_the_baseline_a_search_never_holds_more_than_two_models(source, memory, hurried, tmp_path, monkeypatch):  # noqa: F811
    """Where memory has no room for more. With room it gives the same recipes the same quality."""
    import transformers as T

    alive: set[int] = set()
    most = [0]
    bert = T.BertForSequenceClassification
    made, deep = bert.__init__, bert.__deepcopy__ if hasattr(bert, "__deepcopy__") else None
    assert deep is None

    def noted(model):
        alive.add(id(model))
        weakref.finalize(model, alive.discard, id(model))
        if len(alive) > 3:
            gc.collect()
        most[0] = max(most[0], len(alive))

    def init(model, *args, **options):
        made(model, *args, **options)
        noted(model)

    def setstate(model, state):  # how a deep copy is filled
        torch.nn.Module.__setstate__(model, state)
        noted(model)

    monkeypatch.setattr(bert, "__init__", init)
    monkeypatch.setattr(bert, "__setstate__", setstate, raising=False)
    qualities = []
    for place, room, effort in (("small", 0, {}), ("large", 10**12, {"trials": 3, "finalists": 0, "points": 1})):
        memory["bytes"] = room
        gc.collect()
        alive.clear()
        most[0] = 0
        found = slim(str(source / "model"), own_task(source), out=tmp_path / place, **{**SETTINGS, **effort})
        assert len(found.points) + len(found.trials) >= 3
        assert most[0] <= 3 or room, most
        qualities.append(estimated(tmp_path / place))
        assert not list((tmp_path / place).glob(".draft-*"))
        assert not (found.folder / "baseline" / "rows.json").exists()  # without a limit nothing is cut
        assert found.baseline.recipe.steps[0]["epochs"] == 1.0
        del found
    common = qualities[0].keys() & qualities[1].keys()
    assert len(common) >= 3 and all(qualities[0][steps] == qualities[1][steps] for steps in common)


# -- time -------------------------------------------------------------------------------------------------------


class Ticks:
    """A clock that rises by what a model does alone: `each` seconds per row, three times as many where it trains."""

    def __init__(self, monkeypatch, task, each):
        self.now = 1000.0
        forward, here = task.forward, SimpleNamespace(monotonic=self, perf_counter=self, sleep=lambda seconds: None)

        def ticking(model, batch):
            self.now += each * len(batch["input_ids"]) * (3 if torch.is_grad_enabled() else 1)
            return forward(model, batch)

        monkeypatch.setattr(task, "forward", ticking)
        for module in ("frontier.clock", "frontier.bench", "measure.latency", "training.fit"):
            monkeypatch.setattr(importlib.import_module(f"leanformers.{module}"), "time", here)

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("minutes", "each", "over"), [(10, 0.1, 1.1), (10, 1.0, 1.5)])
def test_a_search_takes_the_time_that_it_was_given(source, hurried, tmp_path, monkeypatch, minutes, each, over, capsys):  # noqa: F811
    """Of 8 epochs of 300 rows the first clock would need more for the baseline's training alone."""
    the_task = own_task(source)
    ticks = Ticks(monkeypatch, the_task, each)
    settings = {**SETTINGS, "tune": {"epochs": 8.0}, "trials": 50, "validation": None, "test": None, "progress": True}
    began = ticks.now
    found = slim(str(source / "model"), the_task, out=tmp_path / "run", minutes=minutes, **settings)
    assert ticks.now - began <= over * 60 * minutes
    assert found.status == "complete" and found.baseline.measurement.quality > 0
    cut = found.baseline.recipe.steps[0]["epochs"]
    assert 0 < cut < 8
    told = " ".join(capsys.readouterr().err.split())
    assert "its fine-tuning takes about" in told and f"cut to epochs {cut}" in told and "test rows" in told
    notes = json.loads((tmp_path / "run" / "baseline" / "notes.json").read_text())
    assert notes["cut"]["asked"][0]["epochs"] == 8.0


def test_a_training_that_is_slower_than_foreseen_is_ended(source, hurried, tmp_path, monkeypatch, capsys):  # noqa: F811
    the_task = own_task(source)
    ticks = Ticks(monkeypatch, the_task, 0.1)
    monkeypatch.setattr(Stop, "seconds", property(lambda self: 1.0))  # far too little
    settings = {**SETTINGS, "tune": {"epochs": 8.0}, "trials": 1, "finalists": 0, "progress": True}
    found = slim(str(source / "model"), the_task, out=tmp_path / "run", minutes=5, **settings)
    assert ticks.now - 1000 <= 1.1 * 300 and found.status == "complete"
    assert "its fine-tuning ended at step" in " ".join(capsys.readouterr().err.split())
    cut = json.loads((tmp_path / "run" / "baseline" / "notes.json").read_text())["cut"]
    assert 0 < cut["steps"] < cut["of"]


def test_a_limit_that_comes_later_keeps_the_rows_that_all_are_compared_on(source, hurried, tmp_path, monkeypatch):  # noqa: F811
    """And a run whose limit is gone goes on."""
    the_task = own_task(source)
    Ticks(monkeypatch, the_task, 0.5)
    monkeypatch.setattr("leanformers.frontier.clock.LEAST", 8)  # of 30 rows
    settings = {**SETTINGS, "validation": None, "test": None, "trials": 1, "finalists": 0}
    slim(str(source / "model"), the_task, out=tmp_path / "run", minutes=3, **settings)
    kept = json.loads((tmp_path / "run" / "baseline" / "rows.json").read_text())
    asked = []
    evaluate = the_task.evaluate

    def seen(predict, tokenizer, split="test", limit=None):
        asked.append((split, limit))
        return evaluate(predict, tokenizer, split, limit)

    monkeypatch.setattr(the_task, "evaluate", seen)
    slim(str(source / "model"), the_task, out=tmp_path / "run", **{**settings, "trials": 2})
    assert {limit for split, limit in asked if split == "validation"} == {kept["validation"]} == {8}
    assert {limit for split, limit in asked if split == "test"} == {None}


def test_what_fits_into_a_time():
    clock = Clock(minutes=10, now=lambda: now[0]) if (now := [5.0]) else None
    assert clock.left() == 600 and clock.left(0.5) == 300 and not clock.up(0.1)
    now[0] += 300
    assert clock.left(0.5) == 0 and clock.up(0.5) and not clock.up()
    assert Clock().left() is None and not Clock().up(0.0) and Clock().rows(None, 10**6, 0.01, 9.0) is None
    assert clock.rows(500, 10**6, 0.1, 0.01) == 500 and clock.rows(None, 100, 0.1, 0.01) is None  # all fit
    assert clock.rows(500, 10**6, 0.1, 1.0) == 60 and clock.rows(None, 10**6, 0.1, 1e9) == LEAST
    assert fitting(None, 1000, 10.0, 0.1) == 100
    (half,) = cut([{"method": "fine-tune", "learning_rate": 1e-3}], seconds=200.0, left=100.0)
    assert half == {"method": "fine-tune", "learning_rate": 1e-3, "epochs": 1.0}  # of its usual 2
    assert cut([{"method": "fine-tune", "epochs": 3.0}], 50.0, 100.0) == [{"method": "fine-tune", "epochs": 3.0}]


def test_a_search_ends_with_what_there_is_when_the_time_is_up(tmp_path):
    """On a clock that the workbench drives; without it eight recipes would be saved."""
    infos = fake.register()
    try:
        now = [0.0]

        def trouble(what, steps):
            now[0] += 60.0 if what == "full" else 1.0

        search, _ = fake.search_in(tmp_path, infos, trials=9, minutes=5, trouble=trouble)
        search.clock = Clock(minutes=5, now=lambda: now[0])
        search.explore()
        search.confirm()
        assert now[0] <= 1.3 * 300 and search.all_saved()
    finally:
        from leanformers.methods import base

        for info in infos:
            base._registry.pop(info.slug, None)
