"""A whole search on a tiny real model: from a folder and a CSV file to checkpoints that load and recipes that repeat."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from filelock import FileLock

import leanformers as lean
from leanformers.deploy import proof
from leanformers.errors import LeanError
from leanformers.frontier import Frontier, slim
from leanformers.frontier.bench import Workbench
from leanformers.recipe import Recipe, run
from leanformers.runtimes import runtimes
from leanformers.tasks import load, task
from vocabularies import wordpiece

GOOD, BAD = ["good", "simple", "useful", "valid", "default"], ["error", "not", "invalid", "raise", "missing"]


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A BERT of four layers without a head, in a folder, and rated sentences in a CSV file."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = wordpiece()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    T.BertModel(T.BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    fill = ["the", "value", "of", "this", "object", "is", "used", "when", "an", "argument", "was", "given"]
    with (folder / "data.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["body", "topic"])
        for i in range(300):
            words = [rng.choice(fill) for _ in range(rng.randint(3, 9))]
            words.insert(rng.randrange(len(words)), rng.choice(GOOD if i % 2 else BAD))
            rows.writerow([" ".join(words) + f" {i}", "good" if i % 2 else "bad"])
    return folder


def own_task(source):
    return task(source / "data.csv", text="body", label="topic", max_length=32)


def search(source, out, **options):
    settings = {
        "goals": ["latency<=0.9x", "bytes<=0.6x", "quality>=0.5x"],
        "tune": {"epochs": 8.0, "learning_rate": 3e-3},
        "methods": ["drop-layers", "distillation", "quantization", "idt5"],
        "trials": 4,
        "finalists": 1,
        "estimate": 64,
        "validation": 60,
        "runtime": "torch",
        "progress": False,
    }
    return slim(str(source / "model"), own_task(source), out=out, **{**settings, **options})


@pytest.fixture(scope="session", autouse=True)
def hurried():
    """Timing as short as it can be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workbench, "quick_seconds", 0.05)
        patch.setattr(Workbench, "last_seconds", 0.2)
        yield


@pytest.fixture(scope="session")
def finished(source, tmp_path_factory) -> Frontier:
    return search(source, tmp_path_factory.mktemp("runs") / "mine")


def logits(folder, text="the value is useful"):
    model = T.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits


def test_the_run_folder_holds_what_it_promises(finished):
    out = finished.folder
    for name in ("run.json", "study.db", "baseline", "points", "frontier.json", "report.html"):
        assert (out / name).exists(), name
    data = json.loads((out / "frontier.json").read_text())
    assert data["schema"] == 1 and data["status"] == "complete" and data["task"]["metric"] == "accuracy"
    assert len(data["points"]) >= 4 and data["baseline"]["ratios"]["quality"] == 1
    assert data["references"][0]["name"].startswith("TF-IDF")
    assert finished.points and {p.name for p in finished.points} == {p.name for p in (out / "points").iterdir()}
    for point in finished.points:
        held = {entry.name for entry in point.folder.iterdir()}
        assert {"config.json", "recipe.yaml", "measurement.json", "environment.json", "README.md"} <= held
        assert logits(point.folder).isfinite().all()
        assert point.tier in ("stock", "lean") and point.meets is not None
        size = sum(file.stat().st_size for file in point.folder.glob("*.safetensors"))
        assert size == pytest.approx(point.measurement.bytes, rel=0.05)
    assert finished.baseline.measurement.quality > 0.8  # it learnt what decides


def forbidden(*args, **kwargs):
    raise AssertionError("it trains again")


def test_the_same_call_again_measures_anew_and_trains_nothing(source, finished, monkeypatch):
    monkeypatch.setattr("leanformers.training.fit", forbidden)
    again = search(source, finished.folder)
    assert {point.name for point in again.trials + again.points} >= {point.name for point in finished.points}


def test_points_run_in_other_runtimes_as_exports(source, tmp_path, monkeypatch, fresh):
    """The run goes on with one more runtime: what is trained stays, every model is measured there besides."""
    refusal = runtimes()["onnxruntime"].refusal()
    if refusal:
        pytest.skip(refusal)
    few = {"methods": ["drop-layers"], "trials": 1, "finalists": 0, "tune": {"epochs": 1.0}}
    search(source, tmp_path / "run", **few)
    monkeypatch.setattr("leanformers.training.fit", forbidden)
    monkeypatch.setattr(proof, "subprocess", SimpleNamespace(run=fresh.run))
    wider = search(source, tmp_path / "run", runtime=["torch", "onnxruntime"], **few)
    deployed = [p for p in wider.points + wider.trials if p.tier == "runtime"]
    assert "baseline@onnxruntime" in {point.name for point in deployed} and len(deployed) >= 2
    for point in deployed:
        assert point.measurement.runtime == "onnxruntime" and (point.folder / "onnx" / "model.onnx").is_file()
        assert point.ratios["latency"] > 0 and point.measurement.bytes > 0
    whole = next(point for point in deployed if point.name == "baseline@onnxruntime")
    assert whole.ratios["quality"] == 1
    on_frontier = next((point for point in wider.points if point.tier == "runtime"), None)
    if on_frontier is not None:
        card = (on_frontier.folder / "README.md").read_text()
        assert "An export for the runtime onnxruntime" in card and "ExportedModel" in card
    assert "onnxruntime" in (wider.folder / "report.html").read_text()


def test_a_runtime_that_fails_is_left_out_with_its_reason(source, finished, monkeypatch):
    def refuse(*args, **kwargs):
        raise LeanError("this layer cannot be exported")

    monkeypatch.setattr("leanformers.deploy.export", refuse)
    monkeypatch.setattr("leanformers.runtimes.check", lambda name: None)
    found = search(source, finished.folder, runtime=["torch", "openvino"])
    assert found.skipped["baseline@openvino"] == "this layer cannot be exported"
    assert not [point for point in found.points if point.name.endswith("@openvino")]


def test_stock_alone_leaves_out_what_transformers_cannot_load(source, finished, tmp_path):
    found = search(source, tmp_path / "run", stock=True, methods=None, trials=1, finalists=0, tune=False)
    assert "--stock" in found.skipped["quantization"] and "--stock" in found.skipped["optin"]
    assert all(point.tier == "stock" for point in found.points)


def test_the_recipe_of_a_point_makes_it_again(source, finished, tmp_path):
    trained = [p for p in finished.points + finished.trials if p.folder is not None and p.status != "baseline"]
    trained = [p for p in trained if any(step["method"] == "distillation" for step in p.recipe.steps)]
    point = trained[0]
    recipe = Recipe.load(point.folder)
    assert recipe.steps[0]["method"] == "fine-tune"
    run(recipe, out=tmp_path / "again", measured=False)
    assert torch.equal(logits(tmp_path / "again"), logits(point.folder))


def test_bad_input_is_refused_before_any_training(source, tmp_path, monkeypatch):
    monkeypatch.setattr("leanformers.training.fit", None)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("x")
    for words, options in [
        ("is not a run of leanformers slim", {"out": occupied}),
        ("is a file", {"out": occupied / "thesis.tex"}),
        ("cannot be read: write METRIC", {"goals": ["fast"]}),
        ("did you mean 'distillation'", {"methods": ["distilation"]}),
        ("trials must be", {"trials": 0}),
        ("minutes must be", {"minutes": -1}),
        ("no setting 'epoch'", {"tune": {"epoch": 3}}),
        ("dtype is one of", {"dtype": "int4"}),
        ("no runtime", {"runtime": "abacus"}),
        ("the device 'abacus' cannot be used here", {"device": "abacus"}),
    ]:
        with pytest.raises(LeanError, match=words) as caught:
            search(source, **{"out": tmp_path / "new", **options})
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_method_that_does_not_suit_is_refused_before_the_baseline_is_trained(source, tmp_path, monkeypatch):
    monkeypatch.setattr("leanformers.frontier.bench.execute", lambda *args, **options: pytest.fail("it was trained"))
    with pytest.raises(LeanError, match="slicegpt"):
        search(source, tmp_path / "run", methods=["slicegpt"])  # BERT norms after each residual sum
    with pytest.raises(LeanError, match="--stock asks for one"):
        search(source, tmp_path / "run", methods=["obert"], stock=True)
    assert not (tmp_path / "run" / "baseline").exists()


def test_another_search_is_not_mixed_into_a_run(source, finished):
    with pytest.raises(LeanError, match="holds a search whose seed is 0, not 1: choose another --out"):
        search(source, finished.folder, seed=1)
    other = task(source / "data.csv", text="body", label="topic", max_length=16)
    with pytest.raises(LeanError, match="whose task is with other data or settings"):
        slim(str(source / "model"), other, out=finished.folder, progress=False)


def test_a_slip_leaves_nothing_that_stands_in_the_way_of_the_right_command(source, tmp_path):
    for name in ("modell", "modelll"):  # the folder is made before the model is looked for
        with pytest.raises(LeanError, match="There is no folder"):
            slim(str(source / name), own_task(source), out=tmp_path / "run", progress=False)
        assert json.loads((tmp_path / "run" / "run.json").read_text())["model"].endswith(name)
    held = FileLock(tmp_path / "run" / "locks" / "baseline.lock")
    with held, pytest.raises(LeanError, match="holds a search whose model is"):  # another process is at it
        slim(str(source / "model"), own_task(source), out=tmp_path / "run", progress=False)


def test_apply_makes_a_lean_model_and_leaves_the_given_one(source):
    model, tokenizer = load(str(source / "model"), own_task(source))
    before = [p.clone() for p in model.parameters()]
    made = lean.apply([{"method": "drop-layers", "keep": 0.5}, {"method": "quantization"}], model)
    assert len(model.bert.encoder.layer) == 4 and len(made.bert.encoder.layer) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not hasattr(made, "tokenizer") and lean.tier(made) == "lean"
    cut = lean.apply([{"method": "idt5"}], (model, tokenizer), own_task(source))
    assert len(cut.tokenizer) < len(tokenizer) and cut.config.vocab_size == len(cut.tokenizer)


def test_an_interrupted_search_ends_with_what_there_is(source, finished, tmp_path, monkeypatch):
    shutil.copytree(finished.folder, tmp_path / "run")
    calls = []

    def estimate(self, steps):
        calls.append(steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(Workbench, "estimate", estimate)
    frontier = search(source, tmp_path / "run", trials=9)
    assert calls and frontier.status == "interrupted" and frontier.points
    assert json.loads((tmp_path / "run" / "frontier.json").read_text())["status"] == "interrupted"
