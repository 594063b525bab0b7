"""measure and compare, end to end on tiny models."""

from __future__ import annotations

import copy

import pytest
import torch

import leanformers as lean
from leanformers.errors import LeanError
from leanformers.measure import Measurement, compare, measure, per_token
from leanformers.measure import run as run_module
from leanformers.runtimes import Prepared, available, prepare


def test_measure_gives_all(bert, task, tokenizer):
    found = measure(bert, task, tokenizer, seconds=0.2, batch_size=8)
    assert isinstance(found, Measurement)
    missing = {name for name, value in found.to_json().items() if value is None}
    assert missing <= {"tokenizer_bytes", "latency_ratio", "latency_range", "decode", "peak_memory"}
    assert found.parameters == sum(p.numel() for p in bert.parameters())
    assert found.metrics["accuracy"] == found.quality == task.evaluate(prepare(bert, task), tokenizer)["accuracy"]
    assert found.rounds >= 5 and found.dtype == "float32" and found.runtime == "torch"
    assert found.throughput * found.latency * 4 == pytest.approx(sum(len(r["ids"]) for r in task.rows[:32]), rel=0.3)


@pytest.mark.skipif("onnxruntime-int8" not in available(), reason="needs leanformers[onnx]")
def test_memory_is_what_the_runtime_holds(bert, task, tokenizer):
    options = {"quality": False, "seconds": 0.1, "batch_size": 4}
    here = measure(bert, task, tokenizer, **options)
    there = measure(bert, task, tokenizer, runtime="onnxruntime-int8", **options)
    assert there.bytes == here.bytes and there.memory < 0.6 * here.memory


def test_padding_is_paid_for_by_real_tokens(bert, task, tokenizer):
    found = measure(bert, task, tokenizer, quality=False, latency=False, batch_size=40)
    longest, real = 12, sum(len(r["ids"]) for r in task.rows)
    d = 32
    per_row = 2 * longest * (24 * d * d + 4 * longest * d) + 2 * d * d + 2 * d * 2
    assert found.flops == pytest.approx(40 * per_row / real)
    assert found.padding == pytest.approx(1 - real / (40 * longest))
    assert found.latency is None and found.quality is None


def test_counting_one_row_of_each_batch_gives_the_same(bert, task, tokenizer, monkeypatch):
    whole = measure(bert, task, tokenizer, quality=False, latency=False).flops
    monkeypatch.setattr(per_token, "_COUNT_WHOLE", 0)
    assert measure(bert, task, tokenizer, quality=False, latency=False).flops == whole


def test_without_a_task(bert):
    found = measure(bert)
    n, d = 62, 32
    assert found.flops == pytest.approx((2 * n * (24 * d * d + 4 * n * d) + 2 * d * d + 2 * d * 2) / n)
    assert found.bytes and found.latency is None


def test_compare_pairs_with_the_first(task, make):
    tok = make["tokenizer"]()
    big, small = make["bert"](layers=6, hidden_size=128), make["bert"](layers=2, hidden_size=128)
    found = compare({"big": (big, tok), "small": (small, tok)}, task, seconds=0.5)
    assert list(found) == ["big", "small"]
    assert found["big"].latency_ratio == 1.0
    ratios = found["small"].ratios(found["big"])
    assert ratios["latency"] == found["small"].latency_ratio < 0.8
    assert ratios["flops"] == pytest.approx(1 / 3, abs=0.01)


def test_a_baseline_is_timed_in_the_same_rounds(task, tokenizer, make):
    big, small = make["bert"](layers=6, hidden_size=128), make["bert"](layers=2, hidden_size=128)
    found = measure(small, task, tokenizer, baseline=(big, tokenizer), quality=False, seconds=0.5)
    assert found.latency_ratio < 0.8 and found.parameters < lean.measure(big).parameters


@pytest.mark.parametrize(("by_batch", "quality"), [(False, 0.5), (True, 1.0)])
def test_what_rounds_by_batch_is_evaluated_in_batches_of_the_timed_size(bert, task, tokenizer, by_batch, quality):
    def answered(batch):  # as a range of activations per batch may have it: right where a row stands alone
        lone = len(batch["labels"]) == 1
        return torch.nn.functional.one_hot(batch["labels"] * lone, 2).float()

    ready = Prepared(name="rounded", call=answered, device=torch.device("cpu"), source=bert, by_batch=by_batch)
    options = {"batch_size": 1, "latency": False}
    assert measure(ready, task, tokenizer, **options).quality == quality


def test_bytes_are_those_of_the_folder(bert, task, tokenizer, tmp_path):
    bert.save_pretrained(tmp_path)
    found = measure(bert, task, tokenizer, folder=tmp_path, quality=False, latency=False)
    assert found.bytes == (tmp_path / "model.safetensors").stat().st_size


def test_the_model_is_left_as_it_was(bert, task, tokenizer):
    before = copy.deepcopy(bert.state_dict())
    state = torch.random.get_rng_state()
    measure(bert, task, tokenizer, seconds=0.1)
    measure(bert)
    assert all(torch.equal(v, before[k]) for k, v in bert.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_hooks for m in bert.modules())


def test_slow_models_are_timed_on_fewer_batches(bert, task, tokenizer, monkeypatch):
    seen = {}
    original = run_module.time_together

    def spy(candidates, **options):
        seen.update({name: len(c.batches) for name, c in candidates.items()})
        return original(candidates, **options)

    monkeypatch.setattr(run_module, "time_together", spy)
    measure(bert, task, tokenizer, quality=False, seconds=1e-6, batch_size=4)
    assert seen == {"model": 1}
    measure(bert, task, tokenizer, quality=False, seconds=5e-6, batch_size=4, batches=1)
    assert seen == {"model": 1}


def test_decoding_rate(make):
    class LanguageTask(make["task"]):
        kind = "causal-lm"

    model = make["llama"]()
    options = {"quality": False, "seconds": 0.2, "batch_size": 4}
    found = compare({"a": (model, make["tokenizer"]())}, LanguageTask(), generate=4, **options)
    assert found["a"].decode > 0
    classifier = measure(make["bert"](), LanguageTask(), make["tokenizer"](), generate=4, **options)
    assert classifier.decode is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"runtime": "abacus"}, "no runtime 'abacus'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_options(bert, task, tokenizer, options, says):
    with pytest.raises(LeanError, match=says):
        measure(bert, task, tokenizer, **options)


def test_nothing_to_compare(task):
    with pytest.raises(LeanError, match="no model to compare"):
        compare({}, task)


def test_the_room_can_be_called(bert):
    assert lean.measure(bert) == measure(bert)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(bert, task, tokenizer):
    on_cpu = measure(bert, task, tokenizer, latency=False)
    found = measure(bert.cuda(), task, tokenizer, seconds=0.5)
    assert found.device == "cuda:0" and found.flops == on_cpu.flops and found.quality == on_cpu.quality
    assert found.peak_memory > found.memory
