import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from leanformers.errors import LeanError
from leanformers.tasks.language import CausalLM, MaskedLM


def causal(texts, max_length=16):
    return CausalLM("t", {"train": [], "validation": [], "test": [{"text": t} for t in texts]}, max_length=max_length)


def test_no_token_is_lost_or_scored_twice(llama_tokenizer):
    text = "the film was very good " * 30
    ids = llama_tokenizer(text, add_special_tokens=False)["input_ids"]
    features = causal([text]).features(llama_tokenizer, "test")
    assert len(features) > 2
    assert [t for f in features for t in f["labels"] if t != -100] == ids
    assert features[0]["input_ids"][0] == llama_tokenizer.bos_token_id
    for before, after in pairwise(features):
        assert after["input_ids"][0] == before["input_ids"][-1]
    assert sum(f["bytes"] for f in features) == len(text.encode())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60),
        min_size=1,
        max_size=5,
    ),
    st.integers(4, 40),
)
def test_bytes_are_those_of_the_text(llama_tokenizer, texts, max_length):
    features = causal(texts, max_length).features(llama_tokenizer, "test")
    assert sum(f["bytes"] for f in features) == sum(len(t.encode()) for t in texts)
    kept = [t for f in features for t in f["labels"] if t != -100]
    assert llama_tokenizer.decode(kept) == "".join(texts)


def test_bits_per_byte_of_a_uniform_model(llama_tokenizer):
    """Every token costs log2 of the vocabulary, whatever the chunks."""
    texts = ["the good film", "Café naïve 日本語"]
    vocab = len(llama_tokenizer)
    tokens = sum(len(llama_tokenizer(t)["input_ids"]) for t in texts)
    for max_length in (4, 64):
        made = causal(texts, max_length)
        found = made.evaluate(lambda b: torch.zeros(*b["input_ids"].shape, vocab), llama_tokenizer)
        assert found["bits_per_byte"] == pytest.approx(tokens * math.log2(vocab) / sum(len(t.encode()) for t in texts))
        assert found["perplexity"] == pytest.approx(vocab, rel=1e-4)


def test_loss_is_the_model_s_own(llama, llama_tokenizer):
    made = causal(["the good film was rather dark", "a sad day"])
    batch = next(made.batches(llama_tokenizer, "test", 2))
    own = llama(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(made.loss(made.forward(llama, batch), batch), own)


def test_masks_are_the_same_in_every_run(bert_tokenizer):
    rows = {
        "train": [],
        "validation": [],
        "test": [{"text": "the film was very good " * 12}, {"text": "bad"}],
    }
    first, second = (MaskedLM("t", rows, max_length=16).features(bert_tokenizer, "test") for _ in range(2))
    assert first == second
    assert MaskedLM("t", rows, max_length=16, seed=1).features(bert_tokenizer, "test") != first
    restored, masked = [], 0
    for f in first:
        assert f["input_ids"][0] == bert_tokenizer.cls_token_id and f["input_ids"][-1] == bert_tokenizer.sep_token_id
        for token, label in zip(f["input_ids"], f["labels"], strict=True):
            assert (token == bert_tokenizer.mask_token_id) == (label != -100)
            masked += label != -100
            restored += [label if label != -100 else token]
    plain = [t for r in rows["test"] for t in bert_tokenizer(r["text"], add_special_tokens=False)["input_ids"]]
    special = {bert_tokenizer.cls_token_id, bert_tokenizer.sep_token_id}
    assert [t for t in restored if t not in special] == plain
    assert 0.1 < masked / len(plain) < 0.25


def test_a_tokenizer_without_mask_is_refused(llama_tokenizer):
    made = MaskedLM("t", {"test": [{"text": "a"}]}, max_length=16)
    with pytest.raises(LeanError, match="no mask token"):
        made.features(llama_tokenizer, "test")


def test_smollm2_is_an_ordinary_model():
    from leanformers.tasks import load

    try:
        model, tokenizer = load("smollm2", dtype="auto")
    except LeanError as error:
        pytest.skip(str(error))
    assert model.dtype == torch.bfloat16 and type(model) in AutoModelForCausalLM._model_mapping.values()
    assert getattr(model.config, "quantization_config", None) is None
    made = causal(["The capital of France is Paris, and the capital of Italy is Rome."], 64)
    found = made.evaluate(lambda b: made.forward(model, b), tokenizer)
    assert found["bits_per_byte"] < 1.0  # a random model needs more than 3
