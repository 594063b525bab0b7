"""Stream-K decode attention: the plan, the merge, the reference in float64, and the kernel by Triton's interpreter."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from interpreting import interpret, needs_triton
from torch.nn.functional import scaled_dot_product_attention

from leanformers.errors import LeanError
from leanformers.kernels import decode
from leanformers.kernels.decode import State, Tuning, decode_attention, fixed_splits, merge, plan, reference

interpret()
TILE = 16
LENGTHS = (1, TILE - 1, TILE, TILE + 1, 10 * TILE + 3)


def drawn(lengths, heads=2, group=3, size=8, dtype=torch.float64, more=5, seed=0, on="cpu"):
    """query, key, value of a cache that is longer than it needs to be, and holds NaN where nothing is to be read."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 4, (len(lengths),), generator=generator)
    end = start + torch.tensor(lengths)
    query = torch.randn(len(lengths), heads * group, 1, size, generator=generator, dtype=dtype)
    key, value = (
        torch.randn(len(lengths), heads, int(end.max()) + more, size, generator=generator, dtype=dtype)
        for _ in range(2)
    )
    place = torch.arange(key.shape[2])
    unread = (place < start[:, None]) | (place >= end[:, None])  # [batch, length]
    for cache in (key, value):
        cache.masked_fill_(unread[:, None, :, None], math.nan)
    return query.to(on), key.to(on), value.to(on), torch.stack([start, end], 1).int().to(on)


def softmax_attention(query, key, value, spans):
    """One sequence after another, in float64, nothing clever."""
    outputs = []
    for q, k, v, (start, end) in zip(query.double(), key.double(), value.double(), spans.tolist(), strict=True):
        group = q.shape[0] // k.shape[0]
        k, v = (part[:, start:end].repeat_interleave(group, 0) for part in (k, v))
        scores = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5  # [heads, 1, length]
        outputs.append(scores.softmax(-1) @ v)
    return torch.stack(outputs)


# -- the plan ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_plan_is_even_and_leaves_nothing_out(seed):
    chance = random.Random(seed)
    lengths = [chance.choice([0, *LENGTHS, chance.randrange(1, 999)]) for _ in range(chance.randrange(1, 6))]
    heads = chance.randrange(1, 5)
    total = heads * sum(max(1, math.ceil(length / TILE)) for length in lengths)
    programs = chance.randrange(1, 3 * total)
    made = plan(lengths, heads, programs, TILE)
    runs = [(a, b) for a, b in zip(made.start, made.stop, strict=True) if a < b]
    assert [at for a, b in runs for at in range(a, b)] == list(range(total))
    sizes = [b - a for a, b in zip(made.start, made.stop, strict=True)]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) * programs / total <= 1 + programs / total
    # The outputs' edges: every program's run starts inside at most one output, the first that it works on.
    edges = [0]
    for count in made.tiles * heads:
        edges.append(edges[-1] + count)
    for output, (low, high) in enumerate(pairwise(edges)):
        assert made.start[made.first[output]] <= low < made.stop[made.first[output]]
        assert made.start[made.last[output]] <= high - 1 < made.stop[made.last[output]]


def test_the_85_percent_rule():
    assert fixed_splits(outputs=112, slots=132, tiles=1000) == 1  # full enough
    assert fixed_splits(outputs=8, slots=132, tiles=2048) == 15  # 120 of 132
    assert fixed_splits(outputs=32, slots=132, tiles=2048) == 4
    assert fixed_splits(outputs=8, slots=132, tiles=1) == 1  # nothing to cut


def test_pieces_that_cross_no_border_are_taken_where_they_fill_the_slots():
    assert decode.even_splits(outputs=8, slots=132, tiles=256) == 16
    assert decode.even_splits(outputs=32, slots=132, tiles=64) == 4
    assert decode.even_splits(outputs=8, slots=132, tiles=3) == 3  # nothing more to cut
    assert decode.even_splits(outputs=112, slots=132, tiles=256) == 1
    assert decode.even_splits(outputs=72, slots=132, tiles=256) == 0  # 60 would be idle
    assert decode.even_splits(outputs=136, slots=132, tiles=256) == 0


def test_where_memory_is_faster_more_tiles_are_on_their_way(monkeypatch):
    gpu = torch.device("cuda", 0)
    for speed, stages in ((25e9, 3), (36e9, 4)):
        monkeypatch.setattr(decode, "bandwidth", lambda device, speed=speed: speed)
        assert decode.choose(128, torch.bfloat16, gpu) == Tuning(64, 4, stages, 1)
        assert decode.choose(64, torch.bfloat16, gpu).stages == 3


def test_bandwidth_is_what_the_memory_was_built_for(monkeypatch):
    from types import SimpleNamespace

    from leanformers.kernels.processors import bandwidth

    h200 = SimpleNamespace(memory_clock_rate=3201000, memory_bus_width=6016, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    bandwidth.cache_clear()
    assert bandwidth(torch.device("cuda", 0)) * 132 == pytest.approx(4.81e12, rel=1e-3)
    del h200.memory_bus_width
    bandwidth.cache_clear()
    assert bandwidth(torch.device("cuda", 0)) == 0 == bandwidth(torch.device("cpu"))
    bandwidth.cache_clear()


# -- merging -------------------------------------------------------------------------------------------------


def state(seed, rows=3, size=4):
    generator = torch.Generator().manual_seed(seed)
    most, values = torch.randn(rows, generator=generator), torch.randn(rows, size, generator=generator)
    return State(most.double(), torch.rand(rows, generator=generator).double() + 0.5, values.double())


def test_merging_is_associative_and_commutative():
    a, b, c = state(0), state(1), state(2)
    for one, other in [(merge(merge(a, b), c), merge(a, merge(b, c))), (merge(a, b), merge(b, a))]:
        for left, right in zip(one, other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-14, atol=1e-14)


def test_an_empty_state_changes_nothing_and_gives_no_nan():
    a = state(0)
    empty = State.empty(3, 4, a.most)
    for merged in (merge(a, empty), merge(empty, a)):
        assert all(torch.equal(left, right) for left, right in zip(merged, a, strict=True))
    nothing = merge(empty, empty)
    assert nothing.weight.eq(0).all() and nothing.output().eq(0).all()


# -- the reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_the_reference_is_softmax_attention_whatever_the_cut(seed):
    chance = random.Random(seed)
    lengths = [chance.choice(LENGTHS) for _ in range(chance.randrange(1, 5))]
    inputs = drawn(lengths, heads=chance.randrange(1, 4), group=chance.randrange(1, 5), seed=seed)
    expected = softmax_attention(*inputs)
    total = inputs[1].shape[1] * sum(math.ceil(length / TILE) for length in lengths)
    for programs in {1, 2, chance.randrange(1, 3 * total), total, 3 * total}:
        for tile in (TILE, 7):
            found = reference(*inputs, programs=programs, tile=tile)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_reference_without_spans_is_sdpa():
    query, key, value, _ = drawn([9, 9], more=0)
    key, value = torch.nan_to_num(key, nan=0.3), torch.nan_to_num(value, nan=0.4)
    expected = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(reference(query, key, value), expected, rtol=0, atol=1e-10)


def test_a_ragged_batch_is_each_sequence_alone():
    query, key, value, spans = drawn([3, 170, 40])
    together = reference(query, key, value, spans, programs=7, tile=TILE)
    for b in range(3):
        alone = reference(*(part[b : b + 1] for part in (query, key, value, spans)), programs=7, tile=TILE)
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-12)


# -- the kernel ----------------------------------------------------------------------------------------------

CASES = [  # lengths, heads, group, size
    ([1], 1, 1, 16),
    ([10 * TILE + 3], 1, 4, 16),
    ([TILE - 1, 1, 3 * TILE], 2, 3, 16),
    ([TILE + 1, 5 * TILE, 2, TILE], 1, 2, 32),
]


# Where all warps share one softmax, and where two or four keep one each.
WARPS = [(torch.float32, TILE, 1e-6), (torch.float16, 2 * TILE, 2e-3), (torch.float16, 4 * TILE, 2e-3)]


@needs_triton
@pytest.mark.parametrize(("dtype", "tile", "error"), WARPS)
@pytest.mark.parametrize(("lengths", "heads", "group", "size"), [*CASES, ([TILE, 9 * TILE], 1, 32, 16)])
def test_the_kernel_is_softmax_attention(lengths, heads, group, size, dtype, tile, error):
    inputs = drawn(lengths, heads, group, size, dtype)
    expected = softmax_attention(*inputs).to(dtype)
    for programs in (1, 3, 5):
        found = decode_attention(*inputs, tuning=Tuning(tile, 4, 2, 1), programs=programs)
        torch.testing.assert_close(found, expected, rtol=10 * error, atol=error)


@needs_triton
@pytest.mark.parametrize(("dtype", "tile", "error"), WARPS)
@pytest.mark.parametrize("schedule", ["fixed-split", "whole"])
def test_the_baselines_are_softmax_attention(schedule, dtype, tile, error):
    inputs = drawn([TILE - 1, 1, 10 * TILE + 1], 1, 2, 16, dtype)
    expected = softmax_attention(*inputs).to(dtype)
    found = decode_attention(*inputs, schedule=schedule, tuning=Tuning(tile, 4, 2, 1))
    torch.testing.assert_close(found, expected, rtol=10 * error, atol=error)


@needs_triton
@pytest.mark.parametrize(("dtype", "tile", "error"), WARPS)
@pytest.mark.parametrize("which", ["both", "values"])
def test_the_kernel_reads_a_cache_by_its_strides(which, dtype, tile, error):
    query, key, value, spans = drawn([20, 33], 2, 2, 16, dtype)
    expected = softmax_attention(query, key, value, spans).to(dtype)
    turned = [
        part.transpose(1, 2).contiguous().transpose(1, 2) for part in (key, value)
    ]  # [batch, length, heads, size]
    caches = turned if which == "both" else (key, turned[1])
    wide = torch.randn(2, 1, 4, 48, dtype=dtype)
    wide[..., :16] = query.transpose(1, 2)
    found = decode_attention(wide[..., :16].transpose(1, 2), *caches, spans, tuning=Tuning(tile, 4, 2, 1))
    torch.testing.assert_close(found, expected, rtol=10 * error, atol=error)


@needs_triton
def test_the_kernel_in_half_precision_without_spans():
    query, key, value, _ = drawn([37, 37], 1, 4, 16, torch.float32, more=0)
    query, key, value = (torch.nan_to_num(part, nan=0.5).half() for part in (query, key, value))
    expected = softmax_attention(query, key, value, torch.tensor([[0, key.shape[2]]] * 2))
    for tile in (TILE, 2 * TILE):
        found = decode_attention(query, key, value, tuning=Tuning(tile, 4, 2, 1), programs=3)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)


@needs_triton
@pytest.mark.parametrize("resident", [1, 2, 3])
@pytest.mark.parametrize("length", [1, TILE - 1, 3 * TILE, 7 * TILE + 5])
def test_a_uniform_cache_is_softmax_attention_by_every_schedule(length, resident):
    """Slots are 2, 4 and 6: one, two or three pieces for each of two outputs."""
    generator = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(1, h, n, 16, generator=generator) for h, n in ((6, 1), (2, length), (2, length)))
    expected = softmax_attention(query, key, value, torch.tensor([[0, length]])).float()
    tuning = Tuning(TILE, 4, 2, resident)
    for schedule in ("stream-k", "fixed-split", "whole"):
        found = decode_attention(query, key, value, schedule=schedule, tuning=tuning)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    crossing = decode_attention(query, key, value, tuning=tuning, programs=5)
    torch.testing.assert_close(crossing, expected, rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.parametrize(("long", "programs"), [(0, 4), (1000, 2)])
def test_long_runs_are_shared_by_two_programs_of_a_multiprocessor(long, programs, monkeypatch):
    from leanformers.kernels import decode_triton

    seen, launch = [], decode_triton.launch
    monkeypatch.setattr(decode_triton, "launch", lambda *given: seen.append(given[6:]) or launch(*given))
    monkeypatch.setattr(decode, "LONG", long)  # tiles of a program
    inputs = drawn([150, 90], 1, 2, 128, torch.float16)
    torch.testing.assert_close(decode_attention(*inputs).double(), softmax_attention(*inputs), rtol=0, atol=2e-3)
    assert seen == [(programs, 0)]


@needs_triton
def test_a_sequence_that_sees_nothing_is_zeros():
    query, key, value, spans = drawn([20, 3], 1, 2, 16, torch.float32)
    spans[1, 1] = spans[1, 0]
    found = decode_attention(query, key, value, spans, tuning=Tuning(TILE, 4, 2, 1), programs=2)
    assert found[1].eq(0).all()
    torch.testing.assert_close(found[:1], softmax_attention(query, key, value, spans)[:1].float(), rtol=1e-5, atol=1e-6)


@needs_triton
def test_repeated_it_is_the_same_to_the_bit():
    inputs = drawn([70, 5], 1, 2, 16, torch.float32)
    tuning = Tuning(TILE, 4, 2, 1)
    first = decode_attention(*inputs, tuning=tuning, programs=3)
    assert all(torch.equal(first, decode_attention(*inputs, tuning=tuning, programs=3)) for _ in range(3))


# -- refusals ------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q.repeat(1, 1, 2, 1), k, v), "one query token, not 2"),
        (lambda q, k, v: (q[..., :12], k[..., :12], v[..., :12]), "heads of 16, 32, 64, 128, 256, not 12"),
        (lambda q, k, v: (q.double(), k, v), "float16, bfloat16 or float32"),
        (lambda q, k, v: (q, k.half(), v), "one dtype"),
        (lambda q, k, v: (q, k, v[:, :, :-1]), "of one shape"),
        (lambda q, k, v: (q[:, :3], k, v), "divide"),
        (lambda q, k, v: (q.repeat(2, 1, 1, 1), k, v), "of one shape"),
        (lambda q, k, v: (q, k, v, torch.tensor([[0, 8]])), "contiguous int32"),
        (lambda q, k, v: (q, k, v, torch.zeros(2, 2, dtype=torch.int32)), r"int32 \[1, 2\]"),
        (lambda q, k, v: (q.requires_grad_(), k, v), "no gradients"),
        (lambda q, k, v: (q, k.transpose(2, 3).contiguous().transpose(2, 3), v), "contiguous"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_sentence(change, words):
    query, key, value, _ = drawn([8], 2, 2, 16, torch.float32)
    with pytest.raises(LeanError, match=words) as caught:
        decode_attention(*change(query, key, value))
    assert "\n" not in str(caught.value)


def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: object())
    query, key, value, _ = drawn([8], 2, 2, 16, torch.float32)
    with pytest.raises(LeanError, match="runs on a GPU, not on 'cpu'"):
        decode_attention(query, key, value)
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LeanError, match="pip install triton"):
        decode_attention(query, key, value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2e-3), (torch.float16, 2e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", [64, 128])
def test_on_a_gpu(dtype, error, size):
    inputs = drawn([1, 1000, 63, 4097], 2, 4, size, dtype, on="cuda")
    expected = softmax_attention(*inputs)
    found = decode_attention(*inputs)
    rounding = torch.finfo(dtype).eps  # of the output itself
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=error)
    assert all(torch.equal(found, decode_attention(*inputs)) for _ in range(1000))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one():
    inputs = drawn([1000, 63], 2, 4, 64, torch.float16, on="cuda:1")
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(decode_attention(*inputs).double(), softmax_attention(*inputs), rtol=1e-3, atol=2e-3)
