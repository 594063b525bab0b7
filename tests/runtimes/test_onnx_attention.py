"""In ONNX Runtime's graphs an encoder's attention is one operator, with the same outputs; other models are left alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from lean_models import TOLERANCE, Forward, batch, farthest

from families import TINY
from leanformers.anatomy import Anatomy
from leanformers.runtimes import available, onnx_attention, prepare
from leanformers.runtimes.calling import call_of
from leanformers.runtimes.exported import trace
from leanformers.runtimes.onnx_attention import fusible
from leanformers.surgery import KeepHeads, apply

pytestmark = pytest.mark.skipif("onnxruntime" not in available(), reason="needs leanformers[onnx]")
ENCODERS = {
    *("bert", "roberta", "distilbert", "electra", "xlm-roberta", "camembert", "vit", "deit", "dinov2", "dinov2-swiglu"),
    *("audio-spectrogram-transformer", "wav2vec2", "wav2vec2-stable"),
}


@pytest.fixture(scope="module")
def uneven():
    """BERT whose layers have 4, 3 and 1 heads, and the operators of its graph."""
    model = TINY["bert"]().eval()
    for layer, heads in ((1, [0, 2, 3]), (2, [1])):
        path = Anatomy.of(model).layers[layer].attention.path
        apply(model, KeepHeads(path=path, size=len(heads)), keep=torch.tensor(heads))
    program = trace(call_of(Forward(), model, batch(model, 2, 7, True)), "onnx").components["model"].program
    return model, list(program.graph.all_nodes())


def test_layers_of_any_number_of_heads_attend_by_one_operator_each(uneven):
    model, nodes = uneven
    heads = [node.attributes["num_heads"].as_int() for node in nodes if node.op_type == "MultiHeadAttention"]
    assert heads == [4, 3, 1]
    kinds = Counter(node.op_type for node in nodes)
    assert not {"Transpose", "Softmax", "Reshape", "Where"} & set(kinds), kinds
    assert farthest(prepare(model, Forward(), "onnxruntime"), model) <= TOLERANCE


def test_the_model_keeps_its_attention(uneven, monkeypatch):
    model, _ = uneven
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(onnx_attention, "attend", None)  # nothing to attend by: tracing fails
    with pytest.raises(Exception, match=r"\w"):
        trace(call_of(Forward(), model, batch(model, 2, 7, True)), "onnx")
    assert model.config._attn_implementation == "sdpa"
    model(**batch(model, 2, 7, True))


@pytest.mark.parametrize("family", list(TINY))
def test_only_plain_encoders_are_fused(family):
    assert fusible(TINY[family]().eval()) == (family in ENCODERS)


def test_an_attention_that_someone_chose_is_left():
    model = TINY["bert"]().eval()
    model.set_attn_implementation("eager")
    assert not fusible(model) and not fusible(torch.nn.Linear(2, 2))
