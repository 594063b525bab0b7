"""Decode attention, one new query token against a long KV cache, with the work spread evenly whatever the lengths.

Source: Lean Attention (Sanovar et al., 2024, arXiv 2405.10480). Softmax attention over a set of keys is reduced from
(m, l, o) over parts of it, so a context may be cut anywhere. The keys of every (sequence, KV head) are cut into tiles,
all tiles are numbered through (heads outermost, then sequences, then tiles), and each of a fixed number of programs
takes an equal run of them, across the borders of sequences and heads (stream-K). What one run holds of an output that
others share is merged in ascending order. The query heads of a KV head are the rows of one tile, so that keys and
values are read once. Where all sequences are of one length and each output's keys can be cut into as many pieces as it
has programs, no program takes tiles of two outputs (`even_splits`), which would drain its pipeline in between; of p
programs each then takes every p-th tile, so that they read one stretch of memory together.

Two schedules of practice stand beside it in the same kernels, as baselines: ``fixed-split`` cuts every context into
the same number of pieces, dealt in the same way (FlashDecoding, by its 85% rule), ``whole`` gives each output to one
program.

Cost: FLOPs unchanged; bytes are the cache, once, plus at most two partials a program. The schedule is worked out in
the kernel from the lengths on the device: no host synchronisation, no preparation, fit for CUDA graphs.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from leanformers.errors import LeanError
from leanformers.kernels.processors import bandwidth, capability, multiprocessors

HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Schedule = Literal["stream-k", "fixed-split", "whole"]


class State(NamedTuple):
    """A partial softmax: largest score (base 2), sum of exp2(score - most), the values weighted by it."""

    most: torch.Tensor  # [rows]
    weight: torch.Tensor  # [rows]
    values: torch.Tensor  # [rows, head_dim]

    @classmethod
    def empty(cls, rows: int, head_dim: int, like: torch.Tensor) -> State:
        """The identity of `merge`: nothing seen."""
        return cls(like.new_full((rows,), -math.inf), like.new_zeros(rows), like.new_zeros(rows, head_dim))

    def output(self) -> torch.Tensor:
        """[rows, head_dim]; zeros where no key was seen."""
        return self.values / torch.where(self.weight > 0, self.weight, 1)[:, None]


def merge(a: State, b: State) -> State:
    """The state over both sets of keys: associative, commutative."""
    most = torch.maximum(a.most, b.most)
    safe = torch.where(most == -math.inf, 0, most)  # -inf - -inf is NaN
    left, right = torch.exp2(a.most - safe), torch.exp2(b.most - safe)
    return State(
        most,
        a.weight * left + b.weight * right,
        a.values * left[:, None] + b.values * right[:, None],
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who does what: program p takes tiles start[p] to stop[p]; an output's tiles lie with programs first to last."""

    tiles: list[int]  # of each sequence
    start: list[int]
    stop: list[int]
    first: list[int]  # [heads x sequences], heads outermost
    last: list[int]


def plan(lengths: list[int], heads: int, programs: int, tile: int) -> Plan:
    """The stream-K plan: what the kernel works out for itself, spelled out.

    lengths: of the sequences, in keys; an empty one has one tile, all masked. heads: KV heads. tile: keys in one.
    """
    tiles = [max(1, -(-length // tile)) for length in lengths]
    total = heads * sum(tiles)
    most = -(-total // programs)
    full = total - (most - 1) * programs  # so many programs take `most` tiles, the others one less
    start = [program * most - max(program - full, 0) for program in range(programs)]
    stop = [start[program] + most - (program >= full) for program in range(programs)]

    def owner(at: int) -> int:
        return at // most if at < full * most else full + (at - full * most) // (most - 1)

    first, last, at = [], [], 0
    for _ in range(heads):
        for count in tiles:
            first.append(owner(at))
            last.append(owner(at + count - 1))
            at += count
    return Plan(tiles=tiles, start=start, stop=stop, first=first, last=last)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    programs: int = 8,
    tile: int = 64,
) -> torch.Tensor:
    """The schedule in plain PyTorch, program by program, in the dtype given. Shapes as `decode_attention`."""
    batch, query_heads, _, size = query.shape
    heads, length = key.shape[1], key.shape[2]
    rows = query.view(batch, heads, query_heads // heads, size) * (
        (size**-0.5 if scaling is None else scaling) / math.log(2)
    )
    edges = [(0, length)] * batch if spans is None else [(int(low), int(high)) for low, high in spans.tolist()]
    schedule = plan([high - low for low, high in edges], heads, programs, tile)
    per_head = sum(schedule.tiles)
    before = [sum(schedule.tiles[:index]) for index in range(batch)]
    # Pieces come in ascending order of programs, which is the order of merging.
    states: dict[tuple[int, int], State] = {}
    for at, stop in zip(schedule.start, schedule.stop, strict=True):
        while at < stop:
            head, inside = divmod(at, per_head)
            sequence = max(index for index in range(batch) if before[index] <= inside)
            begin = inside - before[sequence]
            end = min(schedule.tiles[sequence], begin + stop - at)
            q = rows[sequence, head]  # [group, head_dim]
            state = State.empty(q.shape[0], size, q)
            low, high = edges[sequence]
            for index in range(begin, end):
                here = slice(low + index * tile, min(low + (index + 1) * tile, high))
                k, v = key[sequence, head, here], value[sequence, head, here]
                if k.shape[0]:
                    scores = q @ k.T
                    most = scores.amax(1)
                    weight = torch.exp2(scores - most[:, None])
                    state = merge(state, State(most, weight.sum(1), weight @ v))
            seen = states.get((sequence, head))
            states[sequence, head] = state if seen is None else merge(seen, state)
            at += end - begin
    out = torch.stack([torch.stack([states[b, h].output() for h in range(heads)]) for b in range(batch)])
    return out.view(batch, query_heads, 1, size)


# -- the kernel ----------------------------------------------------------------------------------------------


LONG = 40  # tiles of a program that cuts across outputs; from there on two on one multiprocessor are faster
# Bytes a second to a multiprocessor, from where on two tiles on their way to it are not enough: an H100 gives 25e9, an
# H200 36e9.
FAST = 30e9


class Tuning(NamedTuple):
    """How the kernel is cut: keys per tile, warps, pipeline stages, programs per multiprocessor."""

    tile: int
    warps: int
    stages: int
    resident: int


def choose(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tuning:
    """How to launch: measured in bfloat16 for heads of 64 and 128 (on an H100 and an H200), in float32 (on an H200).

    The rest is a cautious guess that fits the shared memory.
    """
    if dtype == torch.float32:
        return Tuning(32 if head_dim > 64 else 64, 4, 3 if head_dim <= 128 else 2, 2)
    if head_dim > 128:
        return Tuning(32, 4, 3, 1)
    if head_dim > 64:
        return Tuning(64, 4, 4 if bandwidth(device) > FAST else 3, 1)
    return Tuning(64, 4, 3, 2)


def fixed_splits(outputs: int, slots: int, tiles: int) -> int:
    """FlashDecoding's number of pieces per context: the fewest within 85% of the best use of whole waves of slots."""
    if outputs >= 0.8 * slots:
        return 1
    most = min(128, slots, tiles)
    efficiency = []
    for splits in range(1, most + 1):
        # A number of splits that leaves the pieces as long as fewer splits do only adds empty pieces.
        useful = splits == 1 or -(-tiles // splits) != -(-tiles // (splits - 1))
        waves = outputs * splits / slots
        efficiency.append(waves / math.ceil(waves) if useful else 0.0)
    best = max(efficiency)
    return next(index + 1 for index, share in enumerate(efficiency) if share >= 0.85 * best)


def even_splits(outputs: int, slots: int, tiles: int) -> int:
    """Pieces of every context, all of one length, that fill the slots but for a fifth at most; 0 where none do.

    A program that crosses into the next output drains and fills its pipeline once more, which costs more than a few
    idle slots where memory is what limits.
    """
    each = slots // outputs
    return min(each, tiles) if each * outputs >= 0.8 * slots else 0


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    schedule: Schedule = "stream-k",
    tuning: Tuning | None = None,
    programs: int | None = None,
) -> torch.Tensor:
    """Softmax attention of one query token per sequence to its keys, on a GPU.

    Args:
        query: [batch, query heads, 1, head_dim]; head_dim one of `HEAD_DIMS`.
        key, value: [batch, KV heads, length, head_dim], any strides whose last is 1: a cache as it is, which may be
            longer than what it holds. The query heads are a multiple of the KV heads.
        spans: int32 [batch, 2] on the same device: each sequence sees keys spans[b, 0] to spans[b, 1] (left padding
            stands before, unused cache behind; neither is read). None: all of them.
        scaling: of the scores; head_dim ** -0.5 by default.
        schedule: ``stream-k``, or a baseline.
        tuning, programs: instead of what `choose` says; programs is the number of thread blocks of stream-K (which
            then cuts across outputs), or of those that fixed splits are to fill in whole waves (by default one per
            multiprocessor).

    Returns:
        [batch, query heads, 1, head_dim], contiguous; zeros for a sequence that sees no key.

    Raises:
        LeanError: no GPU (nor Triton's interpreter), a head size, dtype or shape it was not built for, gradients.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.compiler.is_compiling() and schedule == "stream-k" and tuning is None and programs is None:
        return _decode_op(query, key, value, spans, scaling)
    return _run(query, key, value, spans, scaling, schedule, tuning, programs)


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor | None,
    scaling: float,
    schedule: Schedule = "stream-k",
    tuning: Tuning | None = None,
    programs: int | None = None,
) -> torch.Tensor:
    if (refused := refusal(query, key, value, spans)) is not None:
        raise LeanError(refused)
    from leanformers.kernels.decode_triton import launch

    chosen = choose(query.shape[-1], query.dtype, query.device)
    tuning = tuning or chosen
    processors = multiprocessors(query.device)
    slots = programs or processors * tuning.resident
    outputs, tiles = query.shape[0] * key.shape[1], max(1, -(-key.shape[2] // tuning.tile))
    splits = 1 if schedule == "whole" else 0
    if schedule == "fixed-split":
        splits = fixed_splits(outputs, programs or processors, tiles)
    elif schedule == "stream-k" and programs is None:
        splits = even_splits(outputs, slots, tiles) if spans is None else 0
        if splits == 0 and tuning is chosen and outputs * tiles > LONG * slots:
            tuning = tuning._replace(stages=min(3, tuning.stages), resident=max(2, tuning.resident))
            slots = processors * tuning.resident
    return launch(query, key, value, spans, scaling, tuning, slots, splits)


@torch.library.custom_op("leanformers::decode_attention", mutates_args=())
def _decode_op(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """The kernel as one operation, so that it breaks no graph."""
    return _run(query, key, value, spans, scaling)


@_decode_op.register_fake
def _(query, key, value, spans, scaling):  # type: ignore[no-untyped-def]
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def refusal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: torch.Tensor | None = None
) -> str | None:
    """Why the kernel cannot attend here, in one sentence with the remedy; None where it can."""
    if (refused := refusal_of_device(query.device, query.dtype, query.shape[-1])) is not None:
        return refused
    if query.shape[2] != 1:
        return f"decode attention takes one query token, not {query.shape[2]}: use scaled_dot_product_attention."
    same = key.shape == value.shape and (key.shape[0], key.shape[-1]) == (query.shape[0], query.shape[-1])
    if not same or query.shape[1] % key.shape[1]:
        return (
            f"decode attention takes keys and values of one shape whose heads divide the query's, not "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}: use scaled_dot_product_attention."
        )
    if key.dtype != query.dtype or value.dtype != query.dtype:
        return f"decode attention takes one dtype, not {query.dtype} against a cache of {key.dtype}: cast one of them."
    if spans is not None:
        right = spans.dtype == torch.int32 and spans.shape == (query.shape[0], 2) and spans.is_contiguous()
        if not right or spans.device != query.device:
            return (
                f"decode attention takes spans as contiguous int32 [{query.shape[0]}, 2] on {query.device}, not "
                f"{spans.dtype} {list(spans.shape)} on {spans.device}: call .int().contiguous() and move them there."
            )
    if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
        return "decode attention takes tensors whose last stride is 1: call .contiguous() on them."
    if torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value)):
        return "decode attention has no gradients: call it under torch.no_grad(), or use scaled_dot_product_attention."
    return None


def refusal_of_device(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The same for what can be known before there are tensors."""
    if head_dim not in HEAD_DIMS:
        return f"decode attention takes heads of {', '.join(map(str, HEAD_DIMS))}, not {head_dim}: use SDPA."
    if dtype not in DTYPES:
        return f"decode attention takes float16, bfloat16 or float32, not {dtype}: cast the model, or use SDPA."
    if importlib.util.find_spec("triton") is None:
        return "decode attention needs Triton: pip install triton, or use SDPA."
    if device.type == "cuda":
        if capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is too old for decode attention (Ampere or later): use SDPA."
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"decode attention runs on a GPU, not on {device.type!r}: move the model to one, or use SDPA."
