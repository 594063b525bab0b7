"""Laws that every kind keeps: padding and batching change nothing, limits are prefixes, features are kept."""

import pickle

import pytest
import torch

from leanformers.errors import LeanError
from leanformers.tasks import task
from leanformers.tasks.embedding import Embedding
from leanformers.tasks.language import CausalLM, MaskedLM
from leanformers.tasks.text import TextClassification, TextRegression

from .tiny import sentences

ROWS = sentences(60, seed=1)
TEXTS = {
    "train": [{"text": t} for t, _ in ROWS[:30]],
    "validation": [{"text": t} for t, _ in ROWS[30:40]],
    "test": [{"text": t * (1 + i % 4)} for i, (t, _) in enumerate(ROWS[40:])],
}


def labelled(convert):
    return {split: [{**row, "label": convert(i)} for i, row in enumerate(rows)] for split, rows in TEXTS.items()}


def pairs():
    return {
        split: [{"query": " ".join(r["text"].split()[:4]), "body": r["text"]} for r in rows]
        for split, rows in TEXTS.items()
    }


MAKE = {
    "text-classification": lambda: TextClassification(
        "t", labelled(lambda i: "ab"[i % 2]), labels=("a", "b"), max_length=32
    ),
    "text-regression": lambda: TextRegression("t", labelled(lambda i: i / 7), max_length=32),
    "embedding": lambda: Embedding("t", pairs(), max_length=32),
    "causal-lm": lambda: CausalLM("t", TEXTS, max_length=16),
    "masked-lm": lambda: MaskedLM("t", TEXTS, max_length=16),
}
MODEL = {
    "text-classification": "bert_classifier",
    "text-regression": "bert_regressor",
    "embedding": "bert_encoder",
    "causal-lm": "llama",
    "masked-lm": "bert_masked",
}


@pytest.fixture(params=MAKE)
def case(request):
    """(task, model, tokenizer) of one kind."""
    kind = request.param
    tokenizer = "llama_tokenizer" if kind == "causal-lm" else "bert_tokenizer"
    return MAKE[kind](), request.getfixturevalue(MODEL[kind]), request.getfixturevalue(tokenizer)


def predictor(made, model):
    return lambda batch: made.forward(model, batch)


def test_metrics_do_not_depend_on_the_batch_size(case):
    made, model, tokenizer = case
    alone = made.evaluate(predictor(made, model), tokenizer, batch_size=1)
    assert made.metric in alone
    for batch_size in (3, 64):
        together = made.evaluate(predictor(made, model), tokenizer, batch_size=batch_size)
        assert together == pytest.approx(alone, abs=1e-5)


@torch.no_grad()
def test_more_padding_changes_neither_loss_nor_outputs(case):
    made, model, tokenizer = case
    features = made.features(tokenizer, "test", 6)
    batch = made.collate(tokenizer, features)
    if made.kind == "embedding":
        batch["labels"] = torch.randn(len(features), 32)
    pad = {"input_ids": tokenizer.pad_token_id, "labels": -100}
    padded = [
        k
        for k, v in batch.items()
        if (v.dim() == 2 and k != "labels") or (k == "labels" and made.kind in ("causal-lm", "masked-lm"))
    ]
    wider = batch | {k: torch.nn.functional.pad(batch[k], (0, 5), value=pad.get(k, 0)) for k in padded}
    assert wider["input_ids"].shape[1] == batch["input_ids"].shape[1] + 5
    loss = made.loss(made.forward(model, batch), batch)
    torch.testing.assert_close(made.loss(made.forward(model, wider), wider), loss, rtol=1e-5, atol=1e-5)


def test_batches_are_padded_to_their_longest_and_sorted(case):
    made, _, tokenizer = case
    seen = 0
    previous = 10**9
    for batch in made.batches(tokenizer, "test", 4):
        lengths = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape[1] == lengths.max() <= min(previous, made.max_length)
        assert (batch["attention_mask"].long().diff(dim=1) <= 0).all()  # padding on the right
        previous = int(lengths.min())
        seen += len(lengths)
    assert seen == len(made.features(tokenizer, "test"))


def test_a_limit_is_a_prefix(case):
    made, _, tokenizer = case
    whole, some = made.features(tokenizer, "test"), made.features(tokenizer, "test", 7)
    assert 0 < len(some) < len(whole)
    assert some == whole[: len(some)]


def test_features_are_kept_per_tokenizer(case):
    made, _, tokenizer = case
    assert made.features(tokenizer, "train") is made.features(tokenizer, "train")
    again = pickle.loads(pickle.dumps(made))
    assert again.fingerprint == made.fingerprint
    assert again.features(tokenizer, "train") == made.features(tokenizer, "train")


def test_calibration_has_model_inputs_alone(case):
    made, model, tokenizer = case
    batches = list(made.calibration(tokenizer, 5, batch_size=2))
    assert all(
        "labels" not in batch and set(batch) <= {"input_ids", "attention_mask", "token_type_ids"} for batch in batches
    )
    model(**batches[0])
    with pytest.raises(LeanError, match="no labels"):
        made.loss(made.forward(model, batches[0]), batches[0])


def test_further_fields_travel_through_collate(case):
    made, model, tokenizer = case
    features = [{**f, "index": i} for i, f in enumerate(made.features(tokenizer, "train")[:4])]
    batch = made.collate(tokenizer, features)
    assert batch["index"].tolist() == [0, 1, 2, 3]
    made.forward(model, batch)


def test_gradients_reach_the_model(case):
    made, model, tokenizer = case
    batch = made.collate(tokenizer, made.features(tokenizer, "train")[:4])
    if made.kind == "embedding":
        batch["labels"] = torch.randn(4, 32)
    model.zero_grad()
    made.loss(made.forward(model, batch), batch).backward()
    assert sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters()) > 10
    model.zero_grad()


def test_fingerprint_follows_data_and_settings(case):
    made, _, _ = case
    same = MAKE[made.kind]()
    assert same.fingerprint == made.fingerprint and len(made.fingerprint) == 16
    longer = MAKE[made.kind]()
    longer.max_length += 1
    assert longer.fingerprint != made.fingerprint
    fewer = MAKE[made.kind]()
    fewer.splits["test"].pop()
    assert fewer.fingerprint != made.fingerprint


def test_ratio_is_above_one_where_better():
    lm, classes = MAKE["causal-lm"](), MAKE["text-classification"]()
    assert (lm.better, classes.better) == ("lower", "higher")
    assert lm.ratio(1.0, 1.1) == pytest.approx(1.1) and classes.ratio(0.99, 0.9) == pytest.approx(1.1)


def test_wrong_names_are_refused(bert_tokenizer):
    made = MAKE["text-classification"]()
    with pytest.raises(LeanError, match=r"no split 'tset'; it has train, validation, test"):
        made.features(bert_tokenizer, "tset")
    with pytest.raises(LeanError, match="no metric 'bleu'; choose accuracy, macro_f1"):
        TextClassification("t", TEXTS, labels=("a", "b"), metric="bleu")
    with pytest.raises(LeanError, match="made already"):
        task(made, size=3)
    assert task(made) is made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_metrics(case):
    made, model, tokenizer = case
    here = made.evaluate(predictor(made, model), tokenizer)
    model.to("cuda")
    try:
        there = made.evaluate(predictor(made, model), tokenizer)
        batch = made.collate(tokenizer, made.features(tokenizer, "train")[:4])
        if made.kind == "embedding":
            batch["labels"] = torch.randn(4, 32)
        assert made.loss(made.forward(model, batch), batch).device.type == "cuda"
    finally:
        model.to("cpu")
    assert there == pytest.approx(here, abs=1e-3)
