"""Folders of exported models: what lies where, and that each runtime alone opens them."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lean_models import TOLERANCE, distance

from families import TINY
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.runtimes import available
from leanformers.runtimes.calling import StandIn, call_of
from leanformers.runtimes.exported import export_model, missing
from leanformers.runtimes.saved import open_exported, save
from leanformers.surgery import DropLayers, KeepNeurons, apply
from leanformers.tasks.embedding import Embedding
from leanformers.tasks.language import CausalLM, MaskedLM
from leanformers.tasks.text import TextClassification, TextRegression
from vocabularies import MAKERS, TEXTS

pytestmark = pytest.mark.skipif(missing("this", "dynamo") is not None, reason="needs transformers 5.23")
onnx = pytest.mark.skipif("onnxruntime" not in available(), reason="needs leanformers[onnx]")
openvino = pytest.mark.skipif("openvino" not in available(), reason="needs leanformers[openvino]")
SHORT = [text[:100] for text in TEXTS[:24]]


def rows(**columns: Any) -> dict[str, list[dict[str, Any]]]:
    made = [{name: make(i, text) for name, make in columns.items()} for i, text in enumerate(SHORT)]
    return {"train": made[:16], "validation": made[16:20], "test": made[16:]}


TASKS = {
    "embedding": lambda: Embedding("t", rows(text=lambda i, text: text), max_length=32),
    "classification": lambda: TextClassification(
        "t", rows(text=lambda i, text: text, label=lambda i, text: "abc"[i % 3]), labels=list("abc"), max_length=32
    ),
    "regression": lambda: TextRegression(
        "t", rows(text=lambda i, text: text, label=lambda i, text: float(i)), max_length=32
    ),
    "masked": lambda: MaskedLM("t", rows(text=lambda i, text: text), max_length=32),
    "causal": lambda: CausalLM("t", rows(text=lambda i, text: text), max_length=32),
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {"bert": MAKERS["wordpiece"](), "llama": MAKERS["byte-level"]()}


def lean(task: str, tokenizer: Any, **fields: Any) -> Any:
    """A model for the task with two layers of different width."""
    family = "llama" if task == "causal" else "bert"
    head = {"embedding": "base", "masked": "lm", "causal": "lm"}.get(task, "classification")
    model = TINY[family](head=head, vocab_size=len(tokenizer), **fields)
    if task == "regression":
        model.classifier = torch.nn.Linear(32, 1)
    apply(model, DropLayers(keep=(0, 2)))
    apply(model, KeepNeurons(path=Anatomy.of(model).layers[0].feed_forward.path, size=20), keep=torch.arange(20))
    return model.eval()


def written(task: Any, model: Any, tokenizer: Any, form: str, folder: Path) -> Path:
    exported = export_model(model, task, form, calibration=task.calibration(tokenizer, 4, 2))
    return save(exported, folder, task, tokenizer)


@pytest.fixture(scope="module")
def folder_of(tokenizers, tmp_path_factory) -> Any:
    """Makes task, tokenizer, lean model and its exported folder, each once."""

    @cache
    def made(kind: str, form: str) -> tuple[Any, Any, Any, Path]:
        task, tokenizer = TASKS[kind](), tokenizers["llama" if kind == "causal" else "bert"]
        model = lean(kind, tokenizer)
        return task, tokenizer, model, written(task, model, tokenizer, form, tmp_path_factory.mktemp("export") / "out")

    return made


def answer(exported: Any, task: Any, model: Any, batch: Any) -> torch.Tensor:
    names = frozenset(call_of(task, model, batch).tensors)
    return task.forward(StandIn(exported.runners["model"], names, exported.config, exported.device), batch)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("masked", "dynamo"),
        ("regression", "dynamo"),
        ("causal", "dynamo"),
        pytest.param("classification", "openvino", marks=openvino),
    ],
)
def test_a_reopened_folder_answers_every_kind_of_task(kind, form, folder_of):
    task, tokenizer, model, folder = folder_of(kind, form)
    exported = open_exported(folder)
    for batch in task.batches(tokenizer, "test", batch_size=3):
        with torch.no_grad():
            assert distance(answer(exported, task, model, batch), task.forward(model, batch)) <= TOLERANCE
    config = json.loads((folder / "config.json").read_text())
    assert not {"quantization_config", "transformers_weights"} & set(config)
    assert config["architectures"] == [type(model).__name__]
    assert (folder / "tokenizer.json").is_file()


@onnx
def test_an_embedder_lies_as_sentence_transformers_keeps_it(tokenizers, tmp_path, fresh):
    import onnxruntime

    task, tokenizer = TASKS["embedding"](), tokenizers["bert"]
    model = lean("embedding", tokenizer)
    model.config.sentence_pooling = "cls"
    folder = written(task, model, tokenizer, "onnx", tmp_path / "out")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names >= {"onnx/model.onnx", "onnx/model.onnx.data", "modules.json", "1_Pooling/config.json", "config.json"}
    assert not {"model.onnx", "model.safetensors"} & names
    assert str(Path.cwd()).encode() not in (folder / "onnx" / "model.onnx").read_bytes()

    batch = next(task.batches(tokenizer, "test", batch_size=3))
    with torch.no_grad():
        states, vectors = model(**task.inputs(batch)).last_hidden_state, task.forward(model, batch)
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    feed = {given.name: batch[given.name].numpy() for given in session.get_inputs()}
    assert set(feed) == {"input_ids", "attention_mask", "token_type_ids"}
    assert distance(torch.from_numpy(session.run(["last_hidden_state"], feed)[0]), states) <= TOLERANCE
    assert distance(answer(open_exported(folder), task, model, batch), vectors) <= TOLERANCE

    # transformers alone, in a process that never heard of leanformers
    np.savez(tmp_path / "feed.npz", **feed)
    code = (
        "import sys, numpy, torch\nfrom transformers.exporters import ExportedModel\n"
        f"feed = {{k: torch.from_numpy(v) for k, v in numpy.load({str(tmp_path / 'feed.npz')!r}).items()}}\n"
        f"out = ExportedModel.from_pretrained({str(folder)!r})(**feed).last_hidden_state\n"
        f"numpy.save({str(tmp_path / 'out.npy')!r}, out.numpy())\nprint('leanformers' in sys.modules)"
    )
    done = fresh.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("False")
    assert distance(torch.from_numpy(np.load(tmp_path / "out.npy")), states) <= TOLERANCE


@openvino
def test_openvino_alone_opens_a_classifier(folder_of):
    import openvino as ov

    task, tokenizer, model, folder = folder_of("classification", "openvino")
    batch = next(task.batches(tokenizer, "test", batch_size=3))
    place = folder / "openvino" / "openvino_model.xml"
    compiled = ov.Core().compile_model(str(place), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({name: tensor.numpy() for name, tensor in task.inputs(batch).items()})["logits"]
    with torch.no_grad():
        assert distance(torch.from_numpy(found), task.forward(model, batch)) <= TOLERANCE


def test_a_folder_without_an_export_is_refused(tmp_path):
    with pytest.raises(LeanError, match=r"holds no exported model \(no export.json\): give the folder"):
        open_exported(tmp_path)


def test_a_folder_whose_runtime_is_missing_is_refused(monkeypatch, tmp_path):
    (tmp_path / "export.json").write_text(json.dumps({"export_format": "openvino"}))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    with pytest.raises(LeanError, match=r"the export in .* needs the package openvino: pip install"):
        open_exported(tmp_path)
