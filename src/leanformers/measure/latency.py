"""Timing of several candidates side by side, since machines are noisy and drift.

All candidates are warmed up, then run in rounds: in each round every candidate goes once over its batches.
They alternate after every block of batches, in an order that rotates, so that drift and neighbours hit all of
them alike. A block is as short as it can be while the fastest candidate takes `BLOCK` seconds for it: long
enough that a small model finds its weights in the cache again, as it would when it runs alone. A ratio is
taken within each block of each round; its median over the rounds counts, weighted by the block's time.

A model against itself on two cores with a load of 2, ten times six seconds: the standard deviation of the
ratio was 0.12 when they alternated once a round and 0.01 with blocks. With a load of 5 and a median of whole
rounds it was 0.04, of blocks 0.02.

The garbage collector is off while the clock runs. On a GPU the clock is a pair of CUDA events, else
`perf_counter`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
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

    latency: seconds per batch, the mean over blocks of their median over rounds.
    latency_p95: 95th percentile of the single calls, in seconds.
    throughput: real (unpadded) tokens per second at that latency.
    ratio: time over that of the first candidate, from pairs of the same round and block.
    ratio_range: quartiles over the rounds of the ratio of whole rounds.
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

    The first candidate is the baseline of the ratios. With up to four candidates the number of rounds is a
    multiple of theirs, so that each stands in each place equally often.
    """
    names = list(candidates)
    clocks = {name: _clock(candidates[name]) for name in names}
    passes = warm_up(candidates, warmup)
    blocks = max(1, min(int(min(passes.values()) / BLOCK), *(len(c.batches) for c in candidates.values())))
    pieces = {name: _split(candidates[name].batches, blocks) for name in names}
    taken: dict[str, list[list[list[float]]]] = {name: [] for name in names}  # [rounds][blocks][calls]
    turns = len(names) if len(names) <= 4 else 1
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        done = 0
        while done < max_rounds:
            enough = done >= min_rounds and time.perf_counter() - started >= seconds
            if enough and done % turns == 0:
                break
            for name in names:
                taken[name].append([])
            for block in range(blocks):
                shift = (done + block) % len(names)
                for name in names[shift:] + names[:shift]:
                    taken[name][-1].append([clocks[name](batch) for batch in pieces[name][block]])
            done += 1
    finally:
        if collecting:
            gc.enable()
    return {name: _timing(candidates[name], taken[name], taken[names[0]]) for name in names}


def _split(batches: Sequence[Batch], count: int) -> list[Sequence[Batch]]:
    edges = [round(i * len(batches) / count) for i in range(count + 1)]
    return [batches[low:high] for low, high in pairwise(edges)]


def _timing(candidate: Candidate, taken: list[list[list[float]]], base: list[list[list[float]]]) -> Timing:
    own = [[sum(calls) for calls in one] for one in taken]  # [rounds][blocks]
    other = [[sum(calls) for calls in one] for one in base]
    own_blocks, other_blocks = list(zip(*own, strict=True)), list(zip(*other, strict=True))  # [blocks][rounds]
    weights = [quantile(block, 0.5) for block in other_blocks]
    ratios = [_ratio(*pair, q=0.5) for pair in zip(own_blocks, other_blocks, strict=True)]
    whole = [sum(one) for one in own], [sum(one) for one in other]
    total = sum(quantile(block, 0.5) for block in own_blocks)
    return Timing(
        latency=total / len(candidate.batches),
        latency_p95=quantile([t for one in taken for calls in one for t in calls], 0.95),
        throughput=candidate.tokens / total,
        ratio=sum(w * r for w, r in zip(weights, ratios, strict=True)) / sum(weights),
        ratio_range=(_ratio(*whole, q=0.25), _ratio(*whole, q=0.75)),
        rounds=len(taken),
    )


def _ratio(own: Sequence[float], other: Sequence[float], q: float) -> float:
    """Quantile of the ratios; between two neighbours the geometric mean, so that 2 and 1/2 meet at 1."""
    return exp(quantile([log(max(a, 1e-9) / max(b, 1e-9)) for a, b in zip(own, other, strict=True)], q))
