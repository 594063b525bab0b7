"""Decode attention in Triton: partials under a schedule (stream-K, or a fixed number of splits), and their merge.

Shapes as in `decode.py`, which holds the schedule in plain PyTorch and the entry that calls this. A program (thread
block) of `_pieces` or `_runs` attends over its tiles; what one program did alone it writes to the output, what several
did goes to scratch as (m, l, o) per row: the largest score in base 2, the sum of exp2(score - m), the sum of
exp2(score - m) v. Slots of scratch, stream-K: program p keeps 2p for its first segment, where that starts inside an
output, and 2p + 1 for its last, where that begins an output which others end. Fixed splits: one slot per output and
split.

A second, small kernel (`_merge`) merges in ascending order of programs, so results repeat bit for bit and no program
ever waits for another. From Hopper on each of the two is launched while the kernel before it runs (programmatic
dependent launch) and waits on the device, which hides its launch. Fused into the first kernel, by the last program to
arrive at an output, the merge was slower on an H100: one program then merges what a program per query head and quarter
does here.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from leanformers.kernels.processors import capability


@triton.jit
def _sequence_tiles(spans, batch, BN: tl.constexpr, BATCH: tl.constexpr):
    """First key, end and number of tiles of every sequence, [BATCH] each; an empty one has a tile, all masked."""
    sequence = tl.arange(0, BATCH)
    real = sequence < batch
    start = tl.load(spans + 2 * sequence, mask=real, other=0)
    end = tl.load(spans + 2 * sequence + 1, mask=real, other=0)
    tiles = tl.where(real, tl.maximum((end - start + BN - 1) // BN, 1), 0)
    return start, end, tiles


LOG2E = 1.4426950408889634
# No kernel of its own for every length of a growing cache.
_NOT = ["batch", "heads", "length", "group", "programs", "splits"]


@triton.jit
def _segment(q, k, v, out, scratch_o, scratch_m, scratch_l,
             q_batch, q_head, k_batch, k_head, k_key, v_batch, v_head, v_key, scale, heads, group,
             sequence, head, start, keys, count, begin, end, slot,
             ROWS: tl.constexpr, M: tl.constexpr, H: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Attend over tiles begin to end of the count of one output, whose keys lie from start; into out, or a slot."""
    row = tl.arange(0, M)
    d = tl.arange(0, H)
    offset = tl.arange(0, BN)
    real = (row < group)[:, None]
    q_at = q + sequence.to(tl.int64) * q_batch + (head * group + row)[:, None] * q_head + d[None, :]
    k_at = k + sequence.to(tl.int64) * k_batch + head.to(tl.int64) * k_head
    v_at = v + sequence.to(tl.int64) * v_batch + head.to(tl.int64) * v_head
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    o = tl.zeros([M, H], tl.float32)
    query = tl.load(q_at, mask=real, other=0.0)  # [M, H]
    for t in tl.range(begin, end, num_stages=STAGES):
        seen = (t * BN + offset) < keys
        place = (start + t * BN).to(tl.int64)
        keys_at = k_at + place * k_key + offset[:, None] * k_key + d[None, :]
        values_at = v_at + place * v_key + offset[:, None] * v_key + d[None, :]
        key = tl.load(keys_at, mask=seen[:, None], other=0.0)  # [BN, H]
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))  # [M, BN]
        # A cache beyond its length may hold NaN, and 0 x NaN is NaN: such values are read as zero.
        value = tl.load(values_at, mask=seen[:, None], other=0.0)  # [BN, H]
        m_new = tl.maximum(m, tl.max(scores, 1))
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        old = tl.exp2(m - safe)
        weight = tl.exp2(scores - safe[:, None])
        total = total * old + tl.sum(weight, 1)
        o = o * old[:, None]
        o = tl.dot(weight.to(value.dtype), value, o, input_precision="ieee")
        m = m_new
    if end - begin == count:
        # Outputs are numbered sequence by sequence, as memory has them: [batch, heads x group, H].
        out_at = out + ((sequence * heads + head) * group).to(tl.int64) * H
        result = o / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out_at + row[:, None] * H + d[None, :], result.to(out.dtype.element_ty), mask=real)
    elif begin < end:
        at = slot * ROWS + row
        tl.store(scratch_m + at, m, mask=row < group)
        tl.store(scratch_l + at, total, mask=row < group)
        tl.store(scratch_o + at[:, None] * H + d[None, :], o, mask=real)


@triton.jit(do_not_specialize=_NOT)
def _pieces(q, k, v, out, spans, scratch_o, scratch_m, scratch_l,
            q_batch, q_head, k_batch, k_head, k_key, v_batch, v_head, v_key, scale,
            batch, heads, length, group, splits,
            SPANS: tl.constexpr, BATCH: tl.constexpr,
            ROWS: tl.constexpr, M: tl.constexpr, H: tl.constexpr, BN: tl.constexpr,
            STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Fixed splits: a program attends over one piece of one output."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # the merge may be launched; it waits until all of this is done
    program = tl.program_id(0)
    output = program // splits
    head = output // batch
    sequence = output - head * batch
    if SPANS:
        starts, ends, counts = _sequence_tiles(spans, batch, BN, BATCH)
        here = tl.arange(0, BATCH) == sequence
        count = tl.sum(tl.where(here, counts, 0), 0)
        start = tl.sum(tl.where(here, starts, 0), 0)
        keys = tl.sum(tl.where(here, ends, 0), 0) - start
    else:
        count = tl.maximum((length + BN - 1) // BN, 1)
        start = 0
        keys = length
    chunk = (count + splits - 1) // splits
    begin = tl.minimum((program % splits) * chunk, count)
    end = tl.minimum(begin + chunk, count)
    _segment(q, k, v, out, scratch_o, scratch_m, scratch_l,
             q_batch, q_head, k_batch, k_head, k_key, v_batch, v_head, v_key, scale, heads, group,
             sequence, head, start, keys, count, begin, end, program, ROWS, M, H, BN, STAGES)  # fmt: skip


@triton.jit(do_not_specialize=_NOT)
def _runs(q, k, v, out, spans, scratch_o, scratch_m, scratch_l,
          q_batch, q_head, k_batch, k_head, k_key, v_batch, v_head, v_key, scale,
          batch, heads, length, group, splits,
          SPANS: tl.constexpr, BATCH: tl.constexpr,
          ROWS: tl.constexpr, M: tl.constexpr, H: tl.constexpr, BN: tl.constexpr,
          STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Stream-K: a program attends over an equal run of all tiles, output after output."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if SPANS:
        starts, ends, counts = _sequence_tiles(spans, batch, BN, BATCH)
        sums = tl.cumsum(counts, 0)
        index = tl.arange(0, BATCH)
        tiles = tl.sum(counts, 0)  # of one head
    else:
        uniform = tl.maximum((length + BN - 1) // BN, 1)
        tiles = batch * uniform
    every = tiles * heads
    most = (every + programs - 1) // programs
    full = every - (most - 1) * programs  # so many programs take `most` tiles, the others one less
    tile = program * most - tl.maximum(program - full, 0)
    stop = tile + most - (program >= full).to(tl.int32)
    while tile < stop:
        head = tile // tiles
        inside = tile - head * tiles
        if SPANS:
            sequence = tl.sum((sums <= inside).to(tl.int32), 0)
            here = index == sequence
            count = tl.sum(tl.where(here, counts, 0), 0)
            start = tl.sum(tl.where(here, starts, 0), 0)
            keys = tl.sum(tl.where(here, ends, 0), 0) - start
            begin = inside - tl.sum(tl.where(here, sums - counts, 0), 0)
        else:
            sequence = inside // uniform
            count = uniform
            start = 0
            keys = length
            begin = inside - sequence * uniform
        end = tl.minimum(count, begin + stop - tile)
        slot = 2 * program + (begin == 0).to(tl.int32)
        _segment(q, k, v, out, scratch_o, scratch_m, scratch_l,
                 q_batch, q_head, k_batch, k_head, k_key, v_batch, v_head, v_key, scale, heads, group,
                 sequence, head, start, keys, count, begin, end, slot, ROWS, M, H, BN, STAGES)  # fmt: skip
        tile += end - begin


@triton.jit(do_not_specialize=_NOT)
def _merge(out, spans, scratch_o, scratch_m, scratch_l, batch, heads, length, group, programs, splits,
           SPANS: tl.constexpr, BATCH: tl.constexpr, FIXED: tl.constexpr,
           ROWS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, S: tl.constexpr,
           PDL: tl.constexpr):  # fmt: skip
    """One program per query head and D of its H: merge its output's pieces, if there are several, S at a time."""
    if PDL:
        gdc_launch_dependents()
    query_head = tl.program_id(0)
    sequence = tl.program_id(1)
    head = query_head // group
    row = query_head - head * group
    if SPANS:
        _starts, _ends, counts = _sequence_tiles(spans, batch, BN, BATCH)
        index = tl.arange(0, BATCH)
        tiles = tl.sum(counts, 0)
        before = tl.sum(tl.where(index < sequence, counts, 0), 0)
        count = tl.sum(tl.where(index == sequence, counts, 0), 0)
    else:
        count = tl.maximum((length + BN - 1) // BN, 1)
        tiles = batch * count
        before = sequence * count
    if not FIXED:
        every = tiles * heads
        most = (every + programs - 1) // programs
        full = every - (most - 1) * programs
        one = head * tiles + before
        last = one + count - 1
        less = tl.maximum(most - 1, 1)
        first = tl.where(one < full * most, one // most, full + (one - full * most) // less)
        final = tl.where(last < full * most, last // most, full + (last - full * most) // less)
        pieces = final - first + 1
    else:
        first = (head * batch + sequence) * splits
        chunk = (count + splits - 1) // splits
        pieces = (count + chunk - 1) // chunk
    if PDL:
        gdc_wait()
    if pieces > 1:
        d = tl.program_id(2) * D + tl.arange(0, D)
        m = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        o = tl.zeros([D], tl.float32)
        for begin in range(0, pieces, S):
            piece = begin + tl.arange(0, S)
            if not FIXED:
                slot = tl.where(piece == 0, 2 * first + 1, 2 * (first + piece))
            else:
                slot = first + piece
            real = piece < pieces
            at = slot * ROWS + row
            m_piece = tl.load(scratch_m + at, mask=real, other=float("-inf"))  # [S]
            total_piece = tl.load(scratch_l + at, mask=real, other=0.0)
            o_piece = tl.load(scratch_o + at[:, None] * H + d[None, :], mask=real[:, None], other=0.0)  # [S, D]
            m_new = tl.maximum(m, tl.max(m_piece, 0))
            safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            old = tl.exp2(m - safe)
            weight = tl.exp2(m_piece - safe)
            total = total * old + tl.sum(weight * total_piece, 0)
            o = o * old + tl.sum(weight[:, None] * o_piece, 0)
            m = m_new
        result = o / tl.where(total > 0.0, total, 1.0)
        at = out + (sequence.to(tl.int64) * heads * group + query_head) * H
        tl.store(at + d, result.to(out.dtype.element_ty))


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor | None,
    scaling: float,
    tuning: Any,
    programs: int,
    splits: int,
) -> torch.Tensor:
    """Run the kernels; arguments as `decode.decode_attention` has checked them. splits 0 is stream-K."""
    batch, query_heads, _, size = query.shape
    heads, length = key.shape[1], key.shape[2]
    group = query_heads // heads
    rows = triton.next_power_of_2(group)
    grid = programs if splits == 0 else batch * heads * splits
    cut = splits != 1  # whether outputs are merged from several programs
    slots = (2 * grid if splits == 0 else grid) * rows if cut else 1
    out = torch.empty((batch, query_heads, 1, size), dtype=query.dtype, device=query.device)
    scratch = torch.empty(slots * (size + 2), dtype=torch.float32, device=query.device)
    scratch_m, scratch_l = scratch[slots * size :], scratch[slots * (size + 1) :]
    pdl = query.is_cuda and _has_dependent_launch(query.device)
    dependent = {"launch_pdl": True} if pdl else {}
    width = 1 if spans is None else triton.next_power_of_2(batch)
    shared = {"SPANS": spans is not None, "BATCH": width, "ROWS": rows, "H": size, "BN": tuning.tile, "PDL": pdl}
    attend = _pieces if splits else _runs
    with torch.cuda.device_of(query):  # Triton launches on the current GPU, wherever the tensors are
        attend[(grid,)](
            query, key, value, out, spans, scratch, scratch_m, scratch_l, *query.stride()[:2], *key.stride()[:3],
            *value.stride()[:3], scaling * LOG2E, batch, heads, length, group, splits,
            **shared, M=max(16, rows), STAGES=tuning.stages, num_warps=tuning.warps, **dependent,
        )  # fmt: skip
        if cut:
            part = min(32, size)  # of a head, so that one warp merges it without a barrier
            together = min(32, triton.next_power_of_2(splits or 16))
            _merge[(query_heads, batch, size // part)](
                out, spans, scratch, scratch_m, scratch_l, batch, heads, length, group, grid, splits,
                **shared, FIXED=splits > 0, D=part, S=together, num_warps=1, **dependent,
            )  # fmt: skip
    return out


def _has_dependent_launch(device: torch.device) -> bool:
    return torch.version.hip is None and capability(device) >= (9, 0)
