"""What a compress method cannot take, from the command line: one sentence, code 2, nothing written, no work done."""

from __future__ import annotations

import csv
import json

import pytest
import transformers as T
from subjects import decoder, encoder
from typer.testing import CliRunner

from leanformers.cli import app
from leanformers.errors import LeanError
from leanformers.methods import get, methods

SENTENCE = "Return the sum of all values along the axis number {}, which is an integer."


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with small models and data."""
    place = tmp_path_factory.mktemp("room")
    for name, one in (("encoder", encoder()), ("decoder", decoder())):
        one.model.save_pretrained(place / name)
        one.tokenizer.save_pretrained(place / name)
    tokenizers = encoder().tokenizer, decoder().tokenizer
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    albert = T.AlbertConfig(vocab_size=len(tokenizers[0]), embedding_size=16, intermediate_size=64, **sizes)
    gemma = T.Gemma3TextConfig(
        vocab_size=len(tokenizers[1]), num_key_value_heads=2, head_dim=8, intermediate_size=64, **sizes
    )
    for name, model, tokenizer in (
        ("tied", T.AlbertForSequenceClassification(albert), tokenizers[0]),
        ("gemma", T.Gemma3ForCausalLM(gemma), tokenizers[1]),
    ):
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    tables = {
        "language": [{"text": SENTENCE.format(i)} for i in range(60)],
        "short": [{"text": f"a {i}"} for i in range(30)],
        "labels": [{"text": SENTENCE.format(i), "label": "xy"[i % 2]} for i in range(60)],
    }
    for name, rows in tables.items():
        with (place / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return place


LANGUAGE = ("language", "causal-lm")
SHORT = ("short", "causal-lm")
CASES = [
    # what the model does not allow
    (["slicegpt"], "encoder", ("labels", None), "only pre-norm models"),
    (["slicegpt"], "gemma", LANGUAGE, "post_attention_layernorm rescales single dimensions"),
    (["fusegpt"], "tied", ("labels", None), "The family 'albert'"),
    (["optin"], "tied", ("labels", None), "is not in the anatomy"),
    ([{"method": "fine-tune"}, "slicegpt"], "encoder", ("labels", None), "only pre-norm models"),
    # a target out of reach
    ([{"method": "slicegpt", "slice": 0.99}], "decoder", LANGUAGE, "fewer than 8 of its 32 dimensions"),
    ([{"method": "vtrans", "target": 0.95}], "decoder", LANGUAGE, "a target of 0.95 is out of reach"),
    ([{"method": "fusegpt", "sparsity": 0.99}], "decoder", LANGUAGE, "takes 3 of its 3 blocks"),
    ([{"method": "optin", "budget": 0.01}], "decoder", LANGUAGE, "below the cost of one head per layer"),
    ([{"method": "dsformer", "ratio": 30.0}], "decoder", LANGUAGE, "room for 0 atoms"),
    ([{"method": "greenformers", "rank": 0.0001}], "decoder", LANGUAGE, "must be a number of at least 0.01"),
    # no labels where they are needed, no texts where those are
    (["axformer"], "encoder", ("short", "embedding"), "needs labelled training data"),
    (["obert"], "encoder", ("short", "embedding"), "needs labelled training data"),
    (["slicegpt"], "decoder", None, "needs texts to calibrate on"),
    (["vtrans"], "decoder", None, "needs training texts"),
    # calibration texts shorter than one sequence
    (["slicegpt"], "decoder", SHORT, "fewer than one sequence of 256"),
    (["fusegpt"], "decoder", SHORT, "fewer than one sequence of 256"),
    ([{"method": "fusegpt", "length": 128}], "decoder", SHORT, "fewer than one sequence of 128"),
    (["optin"], "decoder", SHORT, "fewer than one sequence of 256"),
]


@pytest.mark.parametrize(("steps", "model", "data", "words"), CASES, ids=lambda value: str(value)[:40])
def test_refused_before_any_work(room, tmp_path, monkeypatch, steps, model, data, words):
    def works(*args, **options):
        raise AssertionError("it works before it refuses")

    monkeypatch.setattr("leanformers.training.fit", works)
    monkeypatch.setattr("leanformers.surgery.apply", works)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"steps": [step if isinstance(step, dict) else {"method": step} for step in steps]}))
    out = tmp_path / "lean"
    arguments = ["apply", recipe, "--model", room / model, "--out", out]
    if data is not None:
        name, kind = data
        arguments += ["--data", room / f"{name}.csv", *(["--kind", kind] if kind else [])]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output and not out.exists() and not list(tmp_path.glob(".lean*"))
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ") and words in message


STRUCTURE = [slug for slug, info in methods().items() if info.stage == "structure" and not info.suits]


@pytest.mark.parametrize("slug", STRUCTURE)
def test_a_block_used_twice_is_refused(slug):
    """In memory alone: no supported family stores one."""
    one = decoder()
    one.model.model.layers[2].mlp.up_proj.weight = one.model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(LeanError, match=r"layers\.2 shares weights with layers\.0"):
        get(slug).check(one)
