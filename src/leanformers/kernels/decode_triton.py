"""Decode attention in Triton: partials under a schedule (stream-K, or a fixed number of splits), and their merge.

Shapes as in `decode.py`, which holds the schedule in plain PyTorch and the entry that calls this. A program (thread
block) of `_partials` attends over its tiles; what one program did alone it writes to the output, what several did goes
to scratch as (m, l, o) per row: the largest score in base 2, the sum of exp2(score - m), the sum of exp2(score - m) v.
Slots of scratch, stream-K: program p keeps 2p for its first segment, where that starts inside an output, and 2p + 1
for its last, where that begins an output which others end. Fixed splits: one slot per output and split.

A second, small kernel (`_merge`) merges in ascending order of programs, so results repeat bit for bit and no program
ever waits for another. From Hopper on it is launched while the first one runs (programmatic dependent launch), which
hides its launch. Fused into the first kernel, by the last program to arrive at an output, the merge was slower on an
H100: one program then merges what a program per query head does here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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


@triton.jit(do_not_specialize=_NOT)
def _partials(q, k, v, out, spans, scratch_o, scratch_m, scratch_l,
              q_batch, q_head, k_batch, k_head, k_key, v_batch, v_head, v_key, scale,
              batch, heads, length, group, splits,
              SPANS: tl.constexpr, BATCH: tl.constexpr, FIXED: tl.constexpr,
              ROWS: tl.constexpr, M: tl.constexpr, H: tl.constexpr, BN: tl.constexpr,
              STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        gdc_launch_dependents()  # the merge may be launched; it waits until all of this is done
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
    if not FIXED:
        every = tiles * heads
        most = (every + programs - 1) // programs
        full = every - (most - 1) * programs  # so many programs take `most` tiles, the others one less
        tile = program * most - tl.maximum(program - full, 0)
        stop = tile + most - (program >= full).to(tl.int32)
    else:
        output = program // splits
        if SPANS:
            here = index == output % batch
            count = tl.sum(tl.where(here, counts, 0), 0)
            tile = (output // batch) * tiles + tl.sum(tl.where(here, sums - counts, 0), 0)
        else:
            count = uniform
            tile = output * uniform
        chunk = (count + splits - 1) // splits
        stop = tile + tl.minimum((program % splits + 1) * chunk, count)
        tile += tl.minimum((program % splits) * chunk, count)

    row = tl.arange(0, M)
    d = tl.arange(0, H)
    offset = tl.arange(0, BN)
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
        q_at = q + sequence.to(tl.int64) * q_batch + (head * group + row)[:, None] * q_head + d[None, :]
        query = tl.load(q_at, mask=(row < group)[:, None], other=0.0)  # [M, H]
        k_at = k + sequence.to(tl.int64) * k_batch + head.to(tl.int64) * k_head
        v_at = v + sequence.to(tl.int64) * v_batch + head.to(tl.int64) * v_head
        m = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        o = tl.zeros([M, H], tl.float32)
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

        # Outputs are numbered sequence by sequence, as memory has them: [batch, heads x group, H].
        out_at = out + ((sequence * heads + head) * group).to(tl.int64) * H
        if (begin == 0) & (end == count):
            result = o / tl.where(total > 0.0, total, 1.0)[:, None]
            tl.store(out_at + row[:, None] * H + d[None, :], result.to(out.dtype.element_ty),
                     mask=(row < group)[:, None])  # fmt: skip
        else:
            if not FIXED:
                slot = 2 * program + (begin == 0).to(tl.int32)
            else:
                slot = program
            at = slot * ROWS + row
            tl.store(scratch_m + at, m, mask=row < group)
            tl.store(scratch_l + at, total, mask=row < group)
            tl.store(scratch_o + at[:, None] * H + d[None, :], o, mask=(row < group)[:, None])
        tile += end - begin


@triton.jit(do_not_specialize=_NOT)
def _merge(out, spans, scratch_o, scratch_m, scratch_l, batch, heads, length, group, programs, splits,
           SPANS: tl.constexpr, BATCH: tl.constexpr, FIXED: tl.constexpr,
           ROWS: tl.constexpr, H: tl.constexpr, BN: tl.constexpr, S: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per query head: merge its output's pieces, if there are several."""
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
        d = tl.arange(0, H)
        m = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        o = tl.zeros([H], tl.float32)
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
            o_piece = tl.load(scratch_o + at[:, None] * H + d[None, :], mask=real[:, None], other=0.0)  # [S, H]
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
    pdl = cut and query.is_cuda and _has_dependent_launch(query.device)
    width = 1 if spans is None else triton.next_power_of_2(batch)
    shared = {
        "SPANS": spans is not None,
        "BATCH": width,
        "FIXED": splits > 0,
        "ROWS": rows,
        "H": size,
        "BN": tuning.tile,
    }
    with torch.cuda.device_of(query):  # Triton launches on the current GPU, wherever the tensors are
        _partials[(grid,)](
            query, key, value, out, spans, scratch, scratch_m, scratch_l,
            query.stride(0), query.stride(1), key.stride(0), key.stride(1), key.stride(2),
            value.stride(0), value.stride(1), value.stride(2), scaling * LOG2E, batch, heads, length, group, splits,
            **shared, M=max(16, rows), STAGES=tuning.stages, PDL=pdl, num_warps=tuning.warps,
        )  # fmt: skip
        if cut:
            _merge[(query_heads, batch)](
                out, spans, scratch, scratch_m, scratch_l, batch, heads, length, group, grid, splits,
                **shared, S=max(1, 2048 // size), PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
            )  # fmt: skip
    return out


@lru_cache
def _has_dependent_launch(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
