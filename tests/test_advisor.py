"""Advice comes from sizes alone and says what does not suit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import leanformers as lean
from families import TINY
from leanformers import execute
from leanformers.advisor import advise
from leanformers.methods import Saving, base, method
from vocabularies import wordpiece


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(base, "_registry", {})
    monkeypatch.setattr("leanformers.methods._registry", base._registry)
    monkeypatch.setattr("leanformers.methods._modules", dict)

    @method("halve", stage="structure", paper="Somebody (2020)")
    @dataclass(frozen=True)
    class Halve:
        share: float = 0.5

        def __call__(self, subject):
            raise AssertionError("advice runs nothing")

        def estimate(self, anatomy, length=128):
            return Saving(parameters=-round(anatomy.parameters() * self.share), flops=-length)

        @classmethod
        def starts(cls):
            return [{"share": 0.25}]

    @method("bits", stage="quantise")
    @dataclass(frozen=True)
    class Bits:
        def __call__(self, subject): ...

        def estimate(self, anatomy, length=128):
            return Saving(bytes=-1000)

    @method("silent", stage="recover", needs=("text",))
    @dataclass(frozen=True)
    class Silent:
        def __call__(self, subject): ...

    @method("llama-only", stage="vocabulary", suits={"families": ("llama",)})
    @dataclass(frozen=True)
    class LlamaOnly:
        def __call__(self, subject): ...


def test_advice(registry):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=11, **sizes))
    found = {advice.method: advice for advice in advise(model, length=64)}
    assert list(found) == ["halve", "silent", "bits", "llama-only"]
    assert found["halve"].settings == {"share": 0.25}
    assert found["halve"].ratios["parameters"] == pytest.approx(0.75, abs=1e-3)
    assert found["halve"].ratios["bytes"] == pytest.approx(0.75, abs=1e-3)
    assert 0 < found["halve"].ratios["flops"] < 1
    assert found["bits"].ratios["parameters"] == 1 and found["bits"].ratios["bytes"] < 1
    assert found["silent"].suits and found["silent"].needs == ("text",) and found["silent"].bytes is None
    assert not found["llama-only"].suits and "family bert" in found["llama-only"].reason


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("method", [None, "quantization", "essential-sparsity"])
def test_of_a_folder_the_structure_is_enough(family, method, tmp_path, monkeypatch):
    """The same advice, figure for figure, and no weight is read."""
    model = TINY[family]().to(torch.bfloat16)
    if method:
        model = lean.apply([{"method": method}], model, copy_model=False)
    model.save_pretrained(tmp_path)
    wordpiece().save_pretrained(tmp_path)
    read = []

    def seen(*args, **options):
        read.append(load_model(*args, **options))
        return read[-1]

    load_model = execute.load_model
    monkeypatch.setattr(execute, "load_model", seen)
    found, whole = advise(str(tmp_path)), advise(lean.load(tmp_path, dtype="auto"))
    assert found == whole and len(found) > 10 and any(one.ratios for one in found)
    skeleton = read[0][0]
    assert {t.device.type for t in (*skeleton.parameters(), *skeleton.buffers())} == {"meta"}
