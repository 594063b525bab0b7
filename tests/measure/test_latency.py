"""Timing: order, counts and ratios, on callables that sleep or count."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from leanformers.measure.latency import Candidate, quantile, time_together, warm_up


def sleeper(seconds: float, log: list[str] | None = None, name: str = ""):
    def call(batch: dict) -> None:
        if log is not None:
            log.append(f"{name}{batch['i']}")
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return call


BATCHES = [{"i": i} for i in range(4)]


def test_quantiles_agree_with_torch():
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    for q in (0.0, 0.25, 0.5, 0.95, 1.0):
        expected = torch.quantile(torch.tensor(values, dtype=torch.float64), q).item()
        assert quantile(values, q) == pytest.approx(expected)
    assert quantile([7.0], 0.95) == 7.0


def test_ratio_latency_and_throughput_of_a_known_pair():
    timings = time_together(
        {
            "slow": Candidate(call=sleeper(0.004), batches=BATCHES, tokens=400),
            "fast": Candidate(call=sleeper(0.002), batches=BATCHES, tokens=400),
        },
        seconds=0.3,
    )
    assert timings["slow"].ratio == 1.0
    assert timings["fast"].ratio == pytest.approx(0.5, abs=0.15)
    assert 0.002 <= timings["fast"].latency < timings["slow"].latency
    assert timings["fast"].throughput == pytest.approx(100 / timings["fast"].latency)
    assert timings["fast"].ratio_range[0] <= timings["fast"].ratio <= timings["fast"].ratio_range[1]
    assert timings["slow"].latency_p95 >= 0.004


def test_the_order_rotates_and_every_batch_is_run_once_a_round():
    log: list[str] = []
    candidates = {n: Candidate(call=sleeper(0, log, n), batches=BATCHES[:1]) for n in "abc"}
    time_together(candidates, seconds=0, min_rounds=3, warmup=1)
    assert "".join(log) == "a0b0c0" + "a0b0c0" + "b0c0a0" + "c0a0b0"


def test_slow_candidates_alternate_after_every_batch():
    log: list[str] = []
    candidates = {n: Candidate(call=sleeper(0.06, log, n), batches=BATCHES[:2]) for n in "ab"}
    time_together(candidates, seconds=0, min_rounds=1, warmup=1)
    assert log[4:8] == ["a0", "b0", "b1", "a1"]


def test_rounds_follow_the_budget_and_the_minimum():
    candidate = {"a": Candidate(call=sleeper(0.001), batches=BATCHES[:1])}
    assert time_together(candidate, seconds=0, min_rounds=4)["a"].rounds == 4
    assert time_together(candidate, seconds=10, max_rounds=6)["a"].rounds == 6
    assert 5 <= time_together(candidate, seconds=0.05)["a"].rounds <= 51


def test_the_garbage_collector_is_off_while_timing_and_on_again_after_an_error():
    states: list[bool] = []

    def call(batch: dict) -> None:
        states.append(gc.isenabled())
        if len(states) == 4:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        time_together({"a": Candidate(call=call, batches=BATCHES[:1])}, seconds=0, warmup=2)
    assert states == [True, True, False, False] and gc.isenabled()


@pytest.mark.alone
def test_candidates_may_have_other_numbers_of_batches():
    timings = time_together(
        {
            "a": Candidate(call=sleeper(0.002), batches=BATCHES),
            "b": Candidate(call=sleeper(0.002), batches=BATCHES[:2]),
        },
        seconds=0.1,
    )
    assert timings["b"].ratio == pytest.approx(0.5, abs=0.15)
    assert timings["b"].latency == pytest.approx(timings["a"].latency, rel=0.4)


def test_warm_up_runs_at_least_once():
    log: list[str] = []
    assert warm_up({"a": Candidate(call=sleeper(0, log, "a"), batches=BATCHES)}, repeats=0)["a"] >= 0
    assert len(log) == 4


@pytest.mark.alone
def test_a_model_against_itself(make, task, tokenizer):
    """The ratio of a thing to itself is 1."""
    from leanformers.measure import compare

    model = make["bert"](layers=4, hidden_size=256)
    found = compare({"one": (model, tokenizer), "two": (model, tokenizer)}, task, quality=False, seconds=4)
    assert found["two"].latency_ratio == pytest.approx(1.0, abs=0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_clock_waits_for_the_gpu():
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)

    def work(times: int):
        return lambda batch: [x @ x for _ in range(times)]

    timings = time_together(
        {
            "ten": Candidate(call=work(10), batches=[{}], device=device),
            "five": Candidate(call=work(5), batches=[{}], device=device),
        },
        seconds=1,
    )
    assert timings["five"].ratio == pytest.approx(0.5, abs=0.05)
