"""Timing of several candidates side by side, since machines are noisy and drift.

All candidates are warmed up, then run in rounds: in each round every candidate goes once over its batches.
They alternate after every block of batches, in an order that rotates, so that drift and neighbours hit all of
them alike. A block is as short as it can be while the fastest candidate takes `BLOCK` seconds for it: long
enough that a small model finds its weights in the cache again, as it would when it runs alone. (A model
against itself on two busy cores, ten times six seconds: the ratio's standard deviation was 0.008 with blocks,
0.12 when they alternated once a round.)

A ratio is taken within each round and the median over the rounds is reported. The garbage collector is off
while the clock runs. On a GPU the clock is a pair of CUDA events, else `perf_counter`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from leanformers.measure.batches import Batch

SECONDS = 6.0
MIN_ROUNDS = 5
MAX_ROUNDS = 400
BLOCK = 0.05
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to time: a callable, its batches (already on its device) and the real tokens in them."""

    call: Callable[[Batch], Any]
    batches: Sequence[Batch]
    tokens: int = 0
    device: torch.device = CPU


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long a candidate took.

    latency: seconds per batch, the median over rounds of the round's mean.
    latency_p95: 95th percentile of the single calls, in seconds.
    throughput: real (unpadded) tokens per second at the median round.
    ratio: median over rounds of this candidate's time over the first candidate's in the same round.
    ratio_range: quartiles of that ratio over the rounds.
    """

    latency: float
    latency_p95: float
    throughput: float
    ratio: float
    ratio_range: tuple[float, float]
    rounds: int


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile with linear interpolation between neighbours."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _clock(candidate: Candidate) -> Callable[[Batch], float]:
    """A function that calls the candidate with a batch and returns the seconds that it took."""
    if candidate.device.type == "cuda":

        def timed_on_gpu(batch: Batch) -> float:
            with torch.cuda.device(candidate.device):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                start.record()
                candidate.call(batch)
                end.record()
                torch.cuda.synchronize()
                return start.elapsed_time(end) / 1000.0

        return timed_on_gpu

    def timed(batch: Batch) -> float:
        start = time.perf_counter()
        candidate.call(batch)
        return time.perf_counter() - start

    return timed


def warm_up(candidates: Mapping[str, Candidate], repeats: int = 2) -> dict[str, float]:
    """Run every candidate over its batches `repeats` times, at least once; seconds of each last pass."""
    seconds: dict[str, float] = {}
    for name, candidate in candidates.items():
        clock = _clock(candidate)
        for _ in range(max(1, repeats)):
            seconds[name] = sum(clock(batch) for batch in candidate.batches)
    return seconds


def time_together(
    candidates: Mapping[str, Candidate],
    *,
    seconds: float = SECONDS,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    warmup: int = 2,
) -> dict[str, Timing]:
    """Time the candidates interleaved, for about `seconds` (warm-up aside) and at least `min_rounds` rounds.

    The first candidate is the baseline of the ratios. The number of rounds is made a multiple of the number
    of candidates where the limits allow it, so that each stands in each place equally often.
    """
    names = list(candidates)
    clocks = {name: _clock(candidates[name]) for name in names}
    passes = warm_up(candidates, warmup)
    blocks = max(1, min(int(min(passes.values()) / BLOCK), *(len(c.batches) for c in candidates.values())))
    pieces = {name: _split(candidates[name].batches, blocks) for name in names}
    calls: dict[str, list[list[float]]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        done = 0
        while done < max_rounds:
            spent = time.perf_counter() - started
            if (
                done >= min_rounds
                and spent >= seconds
                and (done % len(names) == 0 or spent >= 1.25 * seconds)
            ):
                break
            for name in names:
                calls[name].append([])
            for block in range(blocks):
                shift = (done + block) % len(names)
                for name in names[shift:] + names[:shift]:
                    calls[name][-1] += [clocks[name](batch) for batch in pieces[name][block]]
            done += 1
    finally:
        if collecting:
            gc.enable()
    totals = {name: [sum(one) for one in rounds] for name, rounds in calls.items()}
    base = totals[names[0]]
    return {name: _timing(candidates[name], calls[name], totals[name], base) for name in names}


def _split(batches: Sequence[Batch], count: int) -> list[Sequence[Batch]]:
    edges = [round(i * len(batches) / count) for i in range(count + 1)]
    return [batches[low:high] for low, high in pairwise(edges)]


def _timing(candidate: Candidate, calls: list[list[float]], totals: list[float], base: list[float]) -> Timing:
    middle = quantile(totals, 0.5)
    ratios = [own / other for own, other in zip(totals, base, strict=True)]
    return Timing(
        latency=middle / len(candidate.batches),
        latency_p95=quantile([t for one in calls for t in one], 0.95),
        throughput=candidate.tokens / middle,
        ratio=quantile(ratios, 0.5),
        ratio_range=(quantile(ratios, 0.25), quantile(ratios, 0.75)),
        rounds=len(totals),
    )
