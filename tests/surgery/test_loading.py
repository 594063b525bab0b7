"""Loading without leanformers must fail, loudly; with it, under every head; and what was tampered with is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from families import TINY
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.surgery import DropLayers, FactoriseLinear, KeepNeurons, apply, ledger, save_delta
from leanformers.surgery.saving import GUARD, digest

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 96,
}
IDS = torch.arange(5, 21).view(2, 8)


def lean_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES)).eval()
    apply(model, KeepNeurons(path="encoder.layer.0", size=40), keep=torch.arange(10, 50))
    return apply(model, FactoriseLinear(path="encoder.layer.1.attention.self.query", rank=4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lean_bert().save_pretrained(tmp_path / "lean")
    return tmp_path / "lean"


def edit_json(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


WITHOUT = """
import sys, warnings, os
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
from transformers import AutoModel, AutoModelForSequenceClassification, BertForSequenceClassification, pipeline
folder = sys.argv[1]
tries = {
    "AutoModel": lambda: AutoModel.from_pretrained(folder),
    "head": lambda: AutoModelForSequenceClassification.from_pretrained(folder),
    "class": lambda: BertForSequenceClassification.from_pretrained(folder),
    "sdpa": lambda: AutoModel.from_pretrained(folder, attn_implementation="sdpa"),
    "mismatched": lambda: AutoModel.from_pretrained(folder, ignore_mismatched_sizes=True),
    "pipeline": lambda: pipeline("text-classification", model=folder, tokenizer="none"),
}
for name, load in tries.items():
    try:
        load()
    except Exception as error:
        print(name, "stopped", "import-leanformers-first" in str(error))
    else:
        print(name, "LOADED")
assert "leanformers" not in sys.modules
"""


def test_without_the_import_nothing_loads(folder, fresh):
    run = fresh.run([sys.executable, "-c", WITHOUT, str(folder)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.split("\n")[:-1]
    assert lines == [
        f"{name} stopped True" for name in ("AutoModel", "head", "class", "sdpa", "mismatched", "pipeline")
    ]


def test_the_folder_loads_under_every_head_of_its_family(folder):
    expected = lean_bert()
    assert torch.equal(AutoModelForSequenceClassification.from_pretrained(folder)(IDS).logits, expected(IDS).logits)
    hidden = expected.bert(IDS).last_hidden_state
    assert torch.equal(AutoModel.from_pretrained(folder)(IDS).last_hidden_state, hidden)
    assert torch.equal(AutoModelForTokenClassification.from_pretrained(folder).bert(IDS).last_hidden_state, hidden)


def test_a_base_model_loads_under_a_head(tmp_path):
    model = lean_bert()
    model.bert.save_pretrained(tmp_path / "base")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(again.bert(IDS).last_hidden_state, model.bert(IDS).last_hidden_state)


def test_a_truncated_file_is_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(LeanError, match=r"model\.safetensors was cut short or altered"):
        AutoModel.from_pretrained(folder)


def test_an_altered_file_is_refused(folder):
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(LeanError, match=r"model\.safetensors was cut short or altered"):
        AutoModel.from_pretrained(folder)


def test_an_unfinished_checkpoint_is_refused(folder):
    edit_json(folder, lambda config: config["quantization_config"].update(files={}))
    with pytest.raises(LeanError, match="unfinished"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_tensors_that_do_not_fit_the_ledger_are_an_error(folder, change):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if change == "missing":
        del tensors["bert.encoder.layer.1.attention.self.query.down.weight"]
    else:
        tensors["bert.encoder.layer.1.attention.self.query.weight"] = torch.zeros(32, 32)
    save_file(tensors, weights, metadata={"format": "pt"})
    edit_json(folder, lambda c: c["quantization_config"].update(files={"model.safetensors": digest(weights)}))
    word = "lacks" if change == "missing" else "has the unknown"
    with pytest.raises(LeanError, match=f"{word} tensor bert.encoder.layer.1.attention.self.query"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_another_shape_is_an_error_even_when_mismatches_are_to_be_ignored(folder):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    tensors[name] = torch.zeros(39, 32)
    save_file(tensors, weights, metadata={"format": "pt"})
    edit_json(folder, lambda c: c["quantization_config"].update(files={"model.safetensors": digest(weights)}))
    with pytest.raises(LeanError, match=r"another shape of tensor encoder\.layer\.0\.intermediate"):
        AutoModel.from_pretrained(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda q: q.update(format=2), "newer leanformers"),
        (lambda q: q["edits"][0].update(version=9), "upgrade leanformers"),
        (lambda q: q["edits"][0].update(type="unheard_of"), "unheard_of"),
        (lambda q: q["edits"][0].update(size=None, colour="red"), "colour"),
        (lambda q: q.update(edits=["nonsense"]), "nonsense"),
    ],
)
def test_a_ledger_that_is_not_understood_is_refused(folder, change, word):
    edit_json(folder, lambda config: change(config["quantization_config"]))
    with pytest.raises(LeanError, match=word):
        AutoModel.from_pretrained(folder)


def test_the_guard_stands_in_the_folder_and_not_in_memory(folder):
    assert json.loads((folder / "config.json").read_text())["transformers_weights"] == GUARD
    assert getattr(AutoModel.from_pretrained(folder).config, "transformers_weights", None) is None


def test_a_refused_edit_leaves_the_model_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(LeanError):
        apply(model, KeepNeurons(path="encoder.layer.0", size=999), keep=torch.arange(999))
    with pytest.raises(LeanError):
        apply(model, KeepNeurons(path="encoder.layer.0", size=3))
    assert ledger(model) == () and not hasattr(model.config, "quantization_config")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# -- delta -------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama_base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def lean_llama(base: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(base)
    return apply(model, FactoriseLinear(path="layers.0.mlp.up_proj", rank=8))


def test_a_delta_holds_only_what_changed_and_loads_to_the_bit(llama_base, tmp_path):
    model = lean_llama(llama_base)
    save_delta(model, tmp_path / "delta", llama_base)
    assert set(load_file(tmp_path / "delta" / "model.safetensors")) == {
        "model.layers.0.mlp.up_proj.up.weight",
        "model.layers.0.mlp.up_proj.down.weight",
    }
    again = LlamaForCausalLM.from_pretrained(tmp_path / "delta")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert ledger(again) == ledger(model)


def test_a_delta_on_another_base_is_refused(llama_base, tmp_path):
    save_delta(lean_llama(llama_base), tmp_path / "delta", llama_base)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).save_pretrained(llama_base)
    with pytest.raises(LeanError, match="another version of"):
        LlamaForCausalLM.from_pretrained(tmp_path / "delta")


def test_a_delta_without_its_base_is_refused(llama_base, tmp_path):
    save_delta(lean_llama(llama_base), tmp_path / "delta", llama_base)
    llama_base.rename(tmp_path / "elsewhere")
    with pytest.raises(LeanError, match="is not there"):
        LlamaForCausalLM.from_pretrained(tmp_path / "delta")


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_the_encoder_alone_loads_from_a_folder_with_edits_of_the_decoder(family, tmp_path):
    from transformers import T5EncoderModel, WhisperForAudioClassification

    model = TINY[family]()
    apply(model, DropLayers(stack="decoder", keep=(0,)))
    ours = "encoder.block.0.layer.1.DenseReluDense.wi_0" if family == "t5" else "encoder.layers.0.fc1"
    theirs = "decoder.block.0.layer.2.DenseReluDense.wi_0" if family == "t5" else "decoder.layers.0.fc1"
    for path in (ours, theirs):
        apply(model, FactoriseLinear(path=path, rank=4))
    model.save_pretrained(tmp_path / "whole")
    head = T5EncoderModel if family == "t5" else WhisperForAudioClassification
    encoder = head.from_pretrained(tmp_path / "whole")
    assert [edit.path for edit in ledger(encoder)] == [ours]
    encoder.save_pretrained(tmp_path / "encoder")
    again = head.from_pretrained(tmp_path / "encoder")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    factors = [Anatomy.of(one).linears()[ours].weight() for one in (encoder, model)]
    assert torch.equal(*factors)
