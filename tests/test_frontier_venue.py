"""A search that measures in the runtime that serves its points: baseline, estimates, ratios, and going on."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as T

from leanformers import folders
from leanformers.deploy.proof import Proof
from leanformers.deploy.targets import TARGETS
from leanformers.errors import LeanError
from leanformers.frontier import slim
from leanformers.frontier import venue as venues
from leanformers.frontier.baseline import BASELINE, SOURCE
from leanformers.frontier.bench import Workbench
from leanformers.frontier.deployed import passing
from leanformers.frontier.slim import runtimes_of, suited
from leanformers.frontier.venue import shape_of, venue_of
from leanformers.measure import measure
from leanformers.methods import MethodInfo, Subject, get
from leanformers.runtimes import available, prepare
from leanformers.surgery import DropLayers, KeepNeurons, apply
from leanformers.tasks import load, task
from test_frontier_slim import source  # noqa: F401

ONNX = "onnxruntime-int8"
pytestmark = pytest.mark.skipif(ONNX not in available(), reason="ONNX Runtime is not here")
OPTIONS = {"split": "validation", "limit": 40, "batch_size": 8, "batches": 2, "seconds": 0.05}


@pytest.fixture(autouse=True, scope="module")
def hurried():
    proof = Proof(cases=1, difference=0, agreement=1)  # of a fresh process: tests/deploy has it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workbench, "quick_seconds", 0.02)
        patch.setattr(Workbench, "last_seconds", 0.1)
        patch.setattr("leanformers.deploy.exporting.prove", lambda *args, **options: proof)
        yield


def toy_exports(patch):
    """Exports that are quick: a byte for each parameter, answered by torch, in int8 with the signs turned round."""
    made = []

    def write(model, tokenizer, task, folder, form):
        made.append(folder)
        (folder / "model.onnx").write_bytes(bytes(sum(p.numel() for p in model.parameters())))
        (folder / "form").write_text(str(form))

    def opened(folder, model, task):
        sign = -1 if (folder / "form").read_text() == "int8-dynamic" else 1
        call = prepare(model, task).call
        return lambda batch: sign * call(batch)

    patch.setitem(TARGETS, "onnx", replace(TARGETS["onnx"], write=write, open=opened))
    return made


@pytest.fixture
def toy(monkeypatch):
    """The folders of the toy's exports, in their order."""
    return toy_exports(monkeypatch)


@pytest.fixture(scope="module")
def own_task(source):  # noqa: F811
    return task(source / "data.csv", text="body", label="topic", max_length=32)


@pytest.fixture(scope="module")
def model(source, tmp_path_factory):  # noqa: F811
    """The folder of a BERT of two layers."""
    folder = tmp_path_factory.mktemp("two") / "model"
    tokenizer = T.AutoTokenizer.from_pretrained(source / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    T.BertModel(T.BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(model, own_task):
    torch.manual_seed(0)
    return load(model, own_task)


@pytest.fixture(scope="module")
def search(model, own_task):
    def searched(out, **options):
        settings = {
            "goals": ["latency<=0.9x", "bytes<=0.9x"],
            "tune": False,
            "methods": ["drop-layers", "idt5"],
            "trials": 2,
            "finalists": 0,
            "points": 2,
            "validation": 40,
            "test": 40,
            "runtime": ONNX,
            "progress": False,
        }
        return slim(model, own_task, out=out, **{**settings, **options})

    return searched


@pytest.fixture(scope="module")
def finished(search, tmp_path_factory):
    """A search with the toy's exports."""
    with pytest.MonkeyPatch.context() as patch:
        made = toy_exports(patch)
        found = search(tmp_path_factory.mktemp("runs") / "mine")
    assert len(made) >= 4  # the baseline, two estimates, a point
    return found


def test_everything_is_measured_where_it_is_served(search, tmp_path):
    """For real: the baseline, an estimate and a point, in ONNX Runtime's int8."""
    found = search(tmp_path / "run", methods=["drop-layers"], trials=1, points=1)
    data = json.loads((found.folder / "frontier.json").read_text())
    whole = data["baseline"]
    assert data["runtime"] == whole["measurement"]["runtime"] == ONNX and whole["ratios"]["latency"] == 1
    assert whole["folder"] == f"exports/{BASELINE}@{ONNX}" and whole["tier"] == "runtime"
    (record,) = estimates(found.folder)
    assert record["measurement"]["runtime"] == ONNX and record["measurement"]["latency_ratio"] is not None
    point = next(point for point in (*found.points, *found.trials) if point.folder)
    assert "@" not in point.name and point.measurement.runtime == ONNX and point.tier == "runtime"
    place = found.folder / "exports" / f"{point.name}@{ONNX}"
    size = sum(file.stat().st_size for file in (place / "onnx").iterdir())
    assert point.measurement.bytes == size == record["measurement"]["bytes"]
    assert point.ratios["bytes"] == size / whole["measurement"]["bytes"] < 1
    report = (found.folder / "report.html").read_text()
    assert f"1 recipe tried as {ONNX} runs them" in report and "baseline in torch does better" not in report


def estimates(folder):
    """What the run's estimates gave."""
    import optuna

    (study,) = optuna.get_all_study_summaries(f"sqlite:///{folder / 'study.db'}")
    trials = optuna.load_study(study_name=study.study_name, storage=f"sqlite:///{folder / 'study.db'}").trials
    return [json.loads(t.user_attrs["result"]) for t in trials if "result" in t.user_attrs]


def test_ratios_are_to_the_baseline_there(finished):
    """Also of quality, which the toy's int8 turns round."""
    whole = finished.baseline
    assert whole.ratios["quality"] == whole.ratios["bytes"] == 1 and whole.measurement.runtime == ONNX
    before = json.loads((finished.folder / BASELINE / SOURCE).read_text())
    assert before["runtime"] == "torch" and before["quality"] == pytest.approx(1 - whole.measurement.quality)
    assert finished.references[-1].name == "baseline in torch"
    tried = [p for p in (*finished.points, *finished.trials) if p.measurement]
    assert len(tried) >= 2 and not any("@" in p.name for p in tried)
    for point in tried:
        assert point.measurement.runtime == ONNX
        assert point.ratios["bytes"] == point.measurement.bytes / whole.measurement.bytes
        assert point.ratios["quality"] == pytest.approx(point.measurement.quality / whole.measurement.quality)
    for point in finished.points:
        assert (point.folder / "model.onnx").is_file() and (point.folder / "recipe.yaml").is_file()
        assert not list(point.folder.glob("*.safetensors"))
        assert f"An export for the runtime {ONNX}" in (point.folder / "README.md").read_text()
    assert not list(finished.folder.glob(".draft-*"))


def test_the_same_call_exports_nothing_again_but_for_another_runtime(search, finished, tmp_path, toy):
    run = shutil.copytree(finished.folder, tmp_path / "run")
    again = search(run)
    assert not toy and again.baseline.measurement.runtime == ONNX
    assert {p.name for p in (*again.points, *again.trials)} == {p.name for p in (*finished.points, *finished.trials)}
    wider = search(run, runtime=[ONNX, "onnxruntime"], methods=["drop-layers"])  # idt5's recipes are there still
    names = {p.name: p for p in (*wider.points, *wider.trials)}
    assert toy and names["baseline@onnxruntime"].measurement.runtime == "onnxruntime"
    assert {p.measurement.runtime for name, p in names.items() if "@" not in name} == {ONNX}


def test_a_run_goes_on_in_its_own_runtime_alone(search, finished, tmp_path):
    words = f"measures in {ONNX}, not in torch: go on with --runtime {ONNX} .*, or choose another --out"
    with pytest.raises(LeanError, match=words):
        search(finished.folder, runtime="auto")
    run = shutil.copytree(finished.folder, tmp_path / "run")
    told = json.loads((run / "run.json").read_text())
    assert told.pop("runtime") == ONNX  # as it was when runs did not write it down
    (run / "run.json").write_text(json.dumps(told))
    with pytest.raises(LeanError, match=f"measures in {ONNX}, not in onnxruntime:"):
        search(run, runtime="onnxruntime")


def test_what_a_killed_search_left_is_made_anew(search, tmp_path, toy, monkeypatch):
    """An export without its baseline or its result is of an attempt that was cut off."""
    run, place, killed = tmp_path / "run", folders.whole, []

    def die(name):
        def whole(target, **options):
            if target.name.startswith(name) and target.parent.name != "exports":
                killed.append(target)
                return dying(place(target, **options))
            return place(target, **options)

        monkeypatch.setattr(folders, "whole", whole)

    @contextmanager
    def dying(context):
        with context as partial:
            yield partial
            raise SystemExit  # the export is there, what it belongs to is not

    for name in (BASELINE, "drop-layers"):
        die(name)
        with pytest.raises(SystemExit):
            search(run, methods=["drop-layers"], trials=1)
        assert killed and not killed[-1].exists()
        export = run / "exports" / f"{killed[-1].name}@{ONNX}"
        assert export.is_dir()
        (export / "of the attempt").touch()
    monkeypatch.setattr(folders, "whole", place)
    found = search(run, methods=["drop-layers"], trials=1)
    assert found.status == "complete"
    assert not list((run / "exports").glob("*/of the attempt"))


def test_what_cannot_run_there_is_refused_before_it_is_trained(search, tmp_path, monkeypatch):
    monkeypatch.setattr("leanformers.training.fit", None)

    def refuse(*args):
        raise LeanError("this layer cannot be exported")

    monkeypatch.setitem(TARGETS, "onnx", replace(TARGETS["onnx"], write=refuse))
    for tune in (True, False):
        with pytest.raises(LeanError, match="this layer cannot be exported"):
            search(tmp_path / f"run-{tune}", tune=tune)


def test_a_recipe_that_cannot_run_there_fails_alone(search, base, tmp_path, toy, monkeypatch):
    write = TARGETS["onnx"].write

    def choosy(model, *rest):
        if model.config.vocab_size < base[0].config.vocab_size:
            raise LeanError("these words cannot be exported")
        write(model, *rest)

    monkeypatch.setitem(TARGETS, "onnx", replace(TARGETS["onnx"], write=choosy))
    found = search(tmp_path / "run", points=1)
    assert found.status == "complete" and [p.recipe.steps[-1]["method"] for p in found.points] == ["drop-layers"]
    failed = {p.reason for p in found.trials if p.status == "failed"}
    assert failed == {"these words cannot be exported"}


# -- estimates --------------------------------------------------------------------------------------------------


def venue_in(folder, own_task, base, runtime):
    venue = venue_of(folder, own_task, runtime)
    venue.baseline, _ = venue.ready(BASELINE, base, folder)
    return venue


def cut(base, keep, seed):
    """A model of one layer that has `keep` neurons, others for each seed."""
    model = apply(copy.deepcopy(base[0]), DropLayers(stack="encoder", keep=(0,)))
    neurons = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:keep].sort().values
    return apply(model, KeepNeurons(path="encoder.layer.0", size=keep), keep=neurons), base[1]


@pytest.mark.parametrize(("runtime", "exports"), [("onnxruntime", 2), (ONNX, 3)])
def test_models_of_one_shape_cost_the_same(base, own_task, tmp_path, toy, runtime, exports):
    """In floats the second of a shape is not even exported; in int8 it is, for its quality alone."""
    venue = venue_in(tmp_path, own_task, base, runtime)
    toy.clear()
    one, two, other = (venue.estimate(cut(base, *what), **OPTIONS) for what in ((16, 0), (16, 1), (32, 0)))
    assert len(toy) == exports
    assert one.runtime == two.runtime == other.runtime == runtime and one.latency_ratio is not None
    assert (one.latency, one.latency_ratio, one.bytes) == (two.latency, two.latency_ratio, two.bytes)
    assert one.latency != other.latency and one.bytes < other.bytes
    assert not list(tmp_path.glob(".draft-*"))


@pytest.mark.parametrize("runtime", ["onnxruntime", ONNX])
def test_of_one_shape_each_has_its_own_quality(base, own_task, tmp_path, toy, runtime):
    """In int8 it is the export's, which the toy turns round."""
    venue = venue_in(tmp_path, own_task, base, runtime)
    for seed in (0, 1, 2):
        pair = cut(base, 16, seed)
        own = measure(pair, own_task, split="validation", limit=40, latency=False).quality
        found = venue.estimate(pair, **OPTIONS).quality
        assert found == pytest.approx(1 - own if runtime == ONNX else own)


def test_a_shape_is_all_but_the_values(base):
    one, two = cut(base, 16, 0), cut(base, 16, 1)
    assert shape_of(*one, 8) == shape_of(*two, 8)
    more = copy.deepcopy(base[1])
    more.add_tokens(["lean"])
    names = {shape_of(*one, 8), shape_of(*one, 16), shape_of(*cut(base, 17, 0), 8), shape_of(one[0], more, 8)}
    one[0].classifier.half()
    assert len(names | {shape_of(*one, 8)}) == 5


def test_two_processes_do_not_share_a_draft(tmp_path):
    with passing(tmp_path) as one, passing(tmp_path) as two:
        assert one != two and one.is_dir() and two.is_dir()
    for turn in (0, 3):
        (tmp_path / f".draft-{turn}").mkdir()
        (tmp_path / f".draft-{turn}" / "of a killed one").touch()
    with passing(tmp_path) as again:
        assert not list(again.iterdir())
    assert not list(tmp_path.glob(".draft-*"))


# -- which runtime ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "first", "others"),
    [
        ("onnxruntime", "onnxruntime", []),
        (["onnxruntime-int8", "onnxruntime", "onnxruntime-int8"], "onnxruntime-int8", ["onnxruntime"]),
        (["onnxruntime", "torch"], "torch", ["onnxruntime"]),
        ("torch", "torch", []),
    ],
)
def test_the_first_named_is_the_searchs_own(own_task, wanted, first, others):
    assert runtimes_of(wanted, own_task) == (first, others)


def test_methods_that_an_export_undoes_are_left_out(own_task, base, monkeypatch):
    infos = {name: get(name) for name in ("drop-layers", "lazyllm")}
    monkeypatch.setattr(MethodInfo, "unsuitable", lambda *args: None)
    monkeypatch.setattr(MethodInfo, "starts", lambda info: [{}])
    subject = Subject(model=base[0], tokenizer=base[1], task=own_task)
    for runtime, kept in (("torch", ["drop-layers", "lazyllm"]), (ONNX, ["drop-layers"])):
        venue = venue_of(Path(), own_task, runtime)
        found, skipped = suited(infos, subject, venue, explicit=False)
        assert list(found) == kept
    assert "An exported decoder reads its prompts whole" in skipped["lazyllm"]
    with pytest.raises(LeanError, match=f"'lazyllm' does not suit {ONNX}"):
        suited(infos, subject, venue, explicit=True)


def test_a_compiled_baseline_is_what_compiled_models_are_timed_against(base, own_task, tmp_path, monkeypatch):
    """Of a runtime of this process too, an estimate's ratio is to the baseline there."""
    seen = Counter()
    real = venues.Venue.ready

    def noted(self, name, pair, place, max_drop=None):
        (ready, tokenizer), files = real(self, name, pair, place, max_drop)
        call = ready.call
        return (replace(ready, call=lambda batch: (seen.update([name]), call(batch))[1]), tokenizer), files

    monkeypatch.setattr(venues.Venue, "ready", noted)
    venue_in(tmp_path, own_task, base, "torch").estimate(cut(base, 16, 0), **OPTIONS)
    assert seen[BASELINE] > 0
