"""Exports: each target answers as its source in a fresh process, and what cannot be proved leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from subjects import decoder, encoder

import leanformers as lean
from leanformers.deploy import TARGETS, check_stock, exporting, obstacles, proof
from leanformers.deploy.proof import ProofError
from leanformers.errors import LeanError
from leanformers.methods import get
from leanformers.runtimes import aot, prepare, runtimes
from leanformers.surgery import DropLayers, FactoriseLinear, KeepHeads, KeepNeurons, MaskWeights, PrunePrompt


@pytest.fixture(autouse=True)
def hurried(monkeypatch, fresh):
    """Timing as short as it can be, and proofs in processes that are forked; tests/test_cli.py has one that is started."""
    monkeypatch.setattr(exporting, "SECONDS", 0.1)
    monkeypatch.setattr(proof, "subprocess", SimpleNamespace(run=fresh.run))


def lean_encoder(keep=(0, 2)):
    """An encoder whose last layer is narrower than the others, one linear of low rank."""
    subject = encoder()
    lean.edit(subject.model, DropLayers(keep=keep))
    lean.edit(subject.model, KeepNeurons(path=f"encoder.layer.{len(keep) - 1}", size=40), keep=torch.arange(40))
    lean.edit(subject.model, FactoriseLinear(path="encoder.layer.0.attention.self.query", rank=6))
    return subject


def exported(subject, to, out, **options):
    return lean.export(subject.model, to, out, task=subject.task, tokenizer=subject.tokenizer, **options)


@pytest.mark.parametrize(("to", "quantize"), [("onnx", None), ("onnx", "int8"), ("openvino", None), ("torch", None)])
def test_a_lean_encoder_is_exported_proved_and_measured(to, quantize, tmp_path, monkeypatch, capfd):
    refusal = runtimes()[TARGETS[to].runtime].refusal()
    if refusal:
        pytest.skip(refusal)
    keep = (0, 2) if to in ("onnx", "openvino") and not quantize else (1,)  # compiling and int8 take longest
    subject = lean_encoder(keep)
    if to == "torch":
        lean.edit(subject.model, KeepHeads(path="encoder.layer.0.attention.self", size=3), keep=torch.tensor([0, 1, 3]))
    done = exported(subject, to, tmp_path / "out", quantize=quantize)
    assert done.proof.cases == 4 and done.proof.difference <= 1e-3
    assert done.measurement.runtime == TARGETS[to].runtime + ("-int8" if quantize else "")
    assert {"latency", "quality", "bytes"} <= set(done.ratios)
    assert quantize or done.ratios["quality"] == 1
    record = json.loads((tmp_path / "out" / "leanformers.json").read_text())
    assert record["target"] == to and record["measurement"]["bytes"] > 0
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]
    if to == "torch":
        assert not "".join(capfd.readouterr()).strip()  # a library may end lines as it is loaded
        the_runtime_of_a_package_answers_as_its_model(subject, tmp_path / "out" / "model.pt2", monkeypatch)


def the_runtime_of_a_package_answers_as_its_model(subject, package, monkeypatch):
    """Its graph is the export's: what took half a minute to compile is taken from there."""
    monkeypatch.setattr(aot, "compile_package", lambda graph, path: Path(shutil.copy(package, path)))
    prepared = prepare(subject.model, subject.task, "torch-aot")
    sizes = ((2, 7), (3, 11), (1, 5), (5, 2), (1, 1))  # rows, length
    for rows, length in sizes:
        ids = torch.randint(4, len(subject.tokenizer), (rows, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[0, 1 + length // 2 :] = 0
        batch = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask}
        with torch.no_grad():
            wanted = subject.task.forward(subject.model, batch)
        assert (prepared(batch) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert "torch-aot (cpu, dtype float32" in prepared.describe()


def test_dynamic_int8_is_exported_without_the_rounding_of_its_inputs(tmp_path):
    refusal = runtimes()["onnxruntime"].refusal()
    if refusal:
        pytest.skip(refusal)
    subject = encoder(num_hidden_layers=1)
    get("quantization").build({"scheme": "int8_dynamic"})(subject)
    assert exported(subject, "onnx", tmp_path / "out", measure=False).proof.difference <= 1e-3


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_a_lean_decoder_is_exported_with_its_cache_and_writes_the_same_tokens(to, tmp_path):
    refusal = runtimes()[TARGETS[to].runtime].refusal()
    if refusal:
        pytest.skip(refusal)
    from leanformers.runtimes.generation import greedy
    from leanformers.runtimes.saved import open_exported

    subject = decoder(num_hidden_layers=2, initializer_range=0.2)
    lean.edit(subject.model, KeepNeurons(path="layers.1.mlp", size=40), keep=torch.arange(40))
    lean.edit(subject.model, KeepHeads(path="layers.0.self_attn", size=1), keep=torch.tensor([1]))
    lean.edit(subject.model, FactoriseLinear(path="layers.1.self_attn.o_proj", rank=6))
    lean.edit(subject.model, MaskWeights(path="layers.0.mlp.up_proj"), mask=torch.rand(64, 32) > 0.4)
    done = exported(subject, to, tmp_path / "out")
    assert done.proof.difference <= 1e-3 and done.ratios["quality"] == pytest.approx(1, abs=1e-4)
    reopened = open_exported(tmp_path / "out")
    assert list(reopened.components) == ["model"] and reopened.generation_config is not None
    ids = torch.randint(4, len(subject.tokenizer), (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :4] = mask[1, :4] = 0  # padded on the left
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for rows, length in ((3, 9), (1, 4)):  # another call begins with an empty cache
        given = {"input_ids": ids[:rows, :length], "attention_mask": mask[:rows, :length]}
        wanted = subject.model.generate(**given, **options)[:, length:]
        assert torch.equal(greedy(reopened, **given, new_tokens=8), wanted)
    with pytest.raises(LeanError, match="in floats alone: export to gguf"):
        exported(subject, to, tmp_path / "int8", quantize="int8")
    assert not (tmp_path / "int8").exists()


@pytest.mark.parametrize("to", ["onnx", "gguf"])
def test_what_an_export_would_no_longer_do_is_refused(to, tmp_path):
    if refusal := runtimes()[TARGETS[to].runtime].refusal():
        pytest.skip(refusal)
    subject = decoder()
    lean.edit(subject.model, PrunePrompt(path="layers.0", rate=0.5))
    with pytest.raises(LeanError, match=r"reads its prompts whole.*Export the model that it was made of"):
        exported(subject, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_stock_model_needs_no_import(tmp_path):
    subject = encoder()
    lean.edit(subject.model, DropLayers(keep=(0, 2)))
    done = exported(subject, "stock", tmp_path / "out", measure=False)
    assert done.proof.difference == 0
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_what_is_not_stock_is_said_with_its_cost(tmp_path):
    subject = lean_encoder()
    with pytest.raises(LeanError) as refusal:
        exported(subject, "stock", tmp_path / "out")
    said = str(refusal.value)
    # 24 neurons of 32 weights in and out
    assert "layers 1 of the encoder have feed-forward widths 40 and others 64" in said and "+1,536" in said
    assert "encoder.layer.0.attention.self.query is factorised" in said and f"{32 * 32 - 2 * 6 * 32:+,}" in said
    assert not list(tmp_path.iterdir())
    check_stock(encoder().model)


def test_masks_are_named():
    subject = decoder()
    path = "layers.0.mlp.down_proj"
    mask = torch.ones(32, 64, dtype=torch.bool)
    mask[0] = False
    lean.edit(subject.model, MaskWeights(path=path), mask=mask)
    assert obstacles(subject.model) == [f"{path} is masked: with the zeros stored as weights they save no bytes"]


def test_an_export_that_answers_otherwise_is_not_kept(tmp_path, monkeypatch):
    def spoilt(model, tokenizer, task, folder, quantize):
        with torch.no_grad():
            model.classifier.bias[0] += 1
        TARGETS_STOCK.write(model, tokenizer, task, folder, quantize)
        with torch.no_grad():
            model.classifier.bias[0] -= 1

    TARGETS_STOCK = TARGETS["stock"]
    monkeypatch.setitem(TARGETS, "stock", dataclasses.replace(TARGETS_STOCK, write=spoilt))
    with pytest.raises(ProofError, match="does not answer as its source: on inputs of shape") as failure:
        exported(encoder(), "stock", tmp_path / "out")
    assert failure.value.exit_code == 1
    assert not list(tmp_path.iterdir())


def test_an_export_that_cannot_be_opened_is_not_kept(tmp_path, monkeypatch):
    def broken(model, tokenizer, task, folder, quantize):
        TARGETS_STOCK.write(model, tokenizer, task, folder, quantize)
        (folder / "model.safetensors").write_bytes(b"")

    TARGETS_STOCK = TARGETS["stock"]
    monkeypatch.setitem(TARGETS, "stock", dataclasses.replace(TARGETS_STOCK, write=broken))
    with pytest.raises(ProofError, match="cannot be opened in a fresh process"):
        exported(encoder(), "stock", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"to": "coreml"}, "there is no export to 'coreml'; choose one of onnx, openvino, gguf, torch, stock"),
        ({"to": "stock", "quantize": "int8"}, "an export to stock cannot be quantised as 'int8'; there is none"),
        (
            {"to": "onnx", "quantize": "int8", "max_drop": 0.01},
            "max_drop bounds what the quantisation to int8 for openvino may lose: export to that, or leave it out",
        ),
        (
            {"to": "openvino", "quantize": "int8", "max_drop": 0},
            "max_drop is a share of the source's quality between 0 and 1, such as 0.01, not 0",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(options, wanted, tmp_path):
    with pytest.raises(LeanError) as refusal:
        lean.export("no such model", out=tmp_path / "out", task="sentiment", **options)
    assert str(refusal.value) == wanted


def test_a_full_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LeanError, match="exists and is not an empty place for an export"):
        lean.export("no such model", "stock", tmp_path, task="sentiment")


def test_an_export_wants_a_task(tmp_path):
    subject = encoder()
    with pytest.raises(LeanError, match="an export is proved on real inputs"):
        lean.export(subject.model, "stock", tmp_path / "out", tokenizer=subject.tokenizer)
