"""Decode attention in Triton: partials under a schedule (stream-K, or a fixed number of splits), and their merge.

Shapes as in `decode.py`, which holds the schedule in plain PyTorch and the entry that calls this. A program (thread
block) of `_attend` attends over its tiles; what one program did alone it writes to the output, what several did goes to
scratch as (m, l, o) per row: the largest score in base 2, the sum of exp2(score - m), the sum of exp2(score - m) v.
Slots of scratch, stream-K: program p keeps 2p for its first segment, where that starts inside an output, and 2p + 1 for
its last, where that begins an output which others end. Fixed splits: one slot per output and split.

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


@triton.jit
def _sequence(starts, ends, counts, here):
    """Number of tiles, first key and number of keys of the one sequence that is here."""
    count = tl.sum(tl.where(here, counts, 0), 0)
    start = tl.sum(tl.where(here, starts, 0), 0)
    return count, start, tl.sum(tl.where(here, ends, 0), 0) - start


LOG2E = 1.4426950408889634
# No kernel of its own for every length of a growing cache.
_NOT = ["batch", "heads", "length", "group", "programs", "splits"]


@triton.jit
def _first_rows(x, ROWS: tl.constexpr):
    """[W, ROWS, H] of x [W, M, H]: halved until no more are left."""
    W: tl.constexpr = x.shape[0]
    M: tl.constexpr = x.shape[1]
    H: tl.constexpr = x.shape[2]
    if M > ROWS:
        first, _rest = tl.split(tl.permute(tl.reshape(x, [W, 2, M // 2, H]), (0, 2, 3, 1)))
        return _first_rows(first, ROWS)
    else:
        return x


@triton.jit
def _with_tile(m, total, o, scores, value):
    """The partials (m, l [..., M], o [..., M, H]) with a tile's scores [..., M, keys] and values [..., keys, H]."""
    LAST: tl.constexpr = len(scores.shape) - 1
    m_new = tl.maximum(m, tl.max(scores, LAST))
    safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    old = tl.exp2(m - safe)
    weight = tl.exp2(scores - tl.expand_dims(safe, LAST))
    total = total * old + tl.sum(weight, LAST)
    o = o * tl.expand_dims(old, LAST)
    return m_new, total, tl.dot(weight.to(value.dtype), value, o, input_precision="ieee")


@triton.jit
def _together(rows, k_at, v_at, k_key, v_key, scale, keys, begin, end, step,
              M: tl.constexpr, H: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """(m [M], l [M], o [M, H]) of every step-th tile from begin to end, all warps on one softmax."""
    k_tile = tl.cast(k_key, tl.int64) * BN
    v_tile = tl.cast(v_key, tl.int64) * BN
    d = tl.arange(0, H)
    offset = tl.arange(0, BN)
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    o = tl.zeros([M, H], tl.float32)
    for t in tl.range(begin, end, step, num_stages=STAGES):
        near = tl.minimum(offset, keys - 1 - t * BN)  # as in _apart
        key = tl.load(k_at + t * k_tile + near[:, None] * k_key + d[None, :])  # [BN, H]
        scores = tl.dot(rows, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where((t * BN + offset < keys)[None, :], scores, float("-inf"))  # [M, BN]
        value = tl.load(v_at + t * v_tile + near[:, None] * v_key + d[None, :])
        m, total, o = _with_tile(m, total, o, scores, value)
    return m, total, o


@triton.jit
def _apart(rows, k_at, v_at, k_key, v_key, scale, keys, begin, end, step,
           ROWS: tl.constexpr, M: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
           SAME: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """The same with o [ROWS, H]: the keys of a tile are dealt to W warps, each with a softmax of its own until the end.

    No warp waits for another then but for a tile to arrive.
    """
    BK: tl.constexpr = BN // W
    k_tile = tl.cast(k_key, tl.int64) * BN
    v_tile = tl.cast(v_key, tl.int64) * BN
    d = tl.arange(0, H)
    row = tl.arange(0, M)
    offset = tl.arange(0, W)[:, None] * BK + tl.arange(0, BK)[None, :]
    m = tl.full([W, M], float("-inf"), tl.float32)
    total = tl.zeros([W, M], tl.float32)
    o = tl.zeros([W, M, H], tl.float32)
    query = tl.zeros([W, M, H], rows.dtype)
    for t in tl.range(begin, end, step, num_stages=STAGES):
        if t == begin:
            # In here, the first tiles are on their way before the query has come. The product with one leaves it in
            # registers as the next product takes it (and what is not finite in one row is then in all of them).
            one = (row[:, None] % ROWS == row[None, :]).to(rows.dtype)  # [M, M]
            one_of_each = tl.broadcast_to(one[None, :, :], [W, M, M])
            of_each = tl.reshape(tl.broadcast_to(rows[None, :, :], [M // ROWS, ROWS, H]), [M, H])
            of_each = tl.broadcast_to(of_each[None, :, :], [W, M, H])
            query = tl.dot(one_of_each, of_each, input_precision="ieee").to(rows.dtype)
        # The last key stands for those behind it: a cache beyond its length may hold NaN, and 0 x NaN is NaN.
        left = keys - 1 - t * BN
        k_near = tl.minimum(offset * k_key, left * k_key)
        v_near = k_near if SAME else tl.minimum(offset * v_key, left * v_key)
        key = tl.load(k_at + t * k_tile + d[None, None, :] + k_near[:, :, None])  # [W, BK, H]
        scores = tl.dot(query, tl.permute(key, (0, 2, 1)), input_precision="ieee") * scale
        scores = tl.where((t * BN + offset < keys)[:, None, :], scores, float("-inf"))  # [W, M, BK]
        value = tl.load(v_at + t * v_tile + d[None, None, :] + v_near[:, :, None])
        m, total, o = _with_tile(m, total, o, scores, value)
    most = tl.max(m, 0)  # [M]
    share = tl.exp2(m - tl.where(most == float("-inf"), 0.0, most)[None, :])  # [W, M]
    return most, tl.sum(total * share, 0), tl.sum(_first_rows(o * share[:, :, None], ROWS), 0)


@triton.jit
def _segment(q, k, v, out, scratch_o, scratch_m, scratch_l,
             q_batch, q_head, k_batch, k_head, k_key, v_batch, v_head, v_key, scale, heads, group,
             sequence, head, start, keys, begin, end, step, alone, slot,
             ROWS: tl.constexpr, M: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
             SAME: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Every step-th tile from begin to end of one output, whose keys lie from start: into out, or a slot."""
    k_at = k + sequence.to(tl.int64) * k_batch + head.to(tl.int64) * k_head + start * tl.cast(k_key, tl.int64)
    v_at = v + sequence.to(tl.int64) * v_batch + head.to(tl.int64) * v_head + start * tl.cast(v_key, tl.int64)
    row = tl.arange(0, M)
    d = tl.arange(0, H)
    few = tl.arange(0, ROWS if W > 1 else M)
    real = (few < group)[:, None]
    q_at = q + sequence.to(tl.int64) * q_batch + (head * group + few)[:, None] * q_head + d[None, :]
    rows = tl.load(q_at, mask=real, other=0.0)
    last = tl.where(keys > 0, end, begin)
    if W > 1:
        m, total, o = _apart(
            rows, k_at, v_at, k_key, v_key, scale, keys, begin, last, step, ROWS, M, H, W, BN, SAME, STAGES
        )
    else:
        m, total, o = _together(rows, k_at, v_at, k_key, v_key, scale, keys, begin, last, step, M, H, BN, STAGES)
    if alone:
        # Outputs are numbered sequence by sequence, as memory has them: [batch, heads x group, H].
        out_at = out + ((sequence * heads + head) * group).to(tl.int64) * H
        divisor = tl.gather(tl.where(total > 0.0, total, 1.0), few, 0)  # of the rows that o has
        tl.store(out_at + few[:, None] * H + d[None, :], (o / divisor[:, None]).to(out.dtype.element_ty), mask=real)
    elif begin < end:
        at = slot * ROWS
        tl.store(scratch_m + at + row, m, mask=row < group)
        tl.store(scratch_l + at + row, total, mask=row < group)
        tl.store(scratch_o + (at + few)[:, None] * H + d[None, :], o, mask=real)


@triton.jit(do_not_specialize=_NOT)
def _attend(q, k, v, out, spans, scratch_o, scratch_m, scratch_l,
            q_batch, q_head, k_batch, k_head, k_key, v_batch, v_head, v_key, scale, batch, heads, length, group,
            SPANS: tl.constexpr, BATCH: tl.constexpr, FIXED: tl.constexpr,
            ROWS: tl.constexpr, M: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
            SAME: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """FIXED: a program attends over one piece of one output. Else over an equal run of all tiles, output by output.

    A piece is every so-manieth tile, so that the programs of an output read one stretch of memory together.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # the merge may be launched; it waits until all of this is done
    if SPANS:
        starts, ends, counts = _sequence_tiles(spans, batch, BN, BATCH)
        index = tl.arange(0, BATCH)
    else:
        start = 0
        keys = length
        count = tl.maximum((length + BN - 1) // BN, 1)
    if FIXED:
        piece = tl.program_id(0)
        splits = tl.num_programs(0)
        head = tl.program_id(1)
        sequence = tl.program_id(2)
        if SPANS:
            count, start, keys = _sequence(starts, ends, counts, index == sequence)
        slot = (sequence * heads + head) * splits + piece
        _segment(q, k, v, out, scratch_o, scratch_m, scratch_l,
                 q_batch, q_head, k_batch, k_head, k_key, v_batch, v_head, v_key, scale, heads, group,
                 sequence, head, start, keys, piece, count, splits, (piece == 0) & (tl.minimum(splits, count) == 1),
                 slot, ROWS, M, H, W, BN, SAME, STAGES)  # fmt: skip
    else:
        program = tl.program_id(0)
        programs = tl.num_programs(0)
        if SPANS:
            sums = tl.cumsum(counts, 0)
            tiles = tl.sum(counts, 0)  # of one head
        else:
            tiles = batch * count
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
                count, start, keys = _sequence(starts, ends, counts, here)
                begin = inside - tl.sum(tl.where(here, sums - counts, 0), 0)
            else:
                sequence = inside // count
                begin = inside - sequence * count
            end = tl.minimum(count, begin + stop - tile)
            slot = 2 * program + (begin == 0).to(tl.int32)
            _segment(q, k, v, out, scratch_o, scratch_m, scratch_l,
                     q_batch, q_head, k_batch, k_head, k_key, v_batch, v_head, v_key, scale, heads, group,
                     sequence, head, start, keys, begin, end, 1, end - begin == count,
                     slot, ROWS, M, H, W, BN, SAME, STAGES)  # fmt: skip
            tile += end - begin


@triton.jit(do_not_specialize=_NOT)
def _merge(out, spans, scratch_o, scratch_m, scratch_l, batch, heads, length, group, programs, splits,
           SPANS: tl.constexpr, BATCH: tl.constexpr, FIXED: tl.constexpr,
           ROWS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, S: tl.constexpr,
           PDL: tl.constexpr):  # fmt: skip
    """One program per query head and D of its H: merge its output's pieces, if there are several, S at a time."""
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
        first = (sequence * heads + head) * splits
        pieces = tl.minimum(splits, count)
    if PDL:
        gdc_wait()
        # Not sooner: programs of a next attention would be dealt to multiprocessors that are not free yet, unevenly.
        gdc_launch_dependents()
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
    height = max(16, rows)  # the least that a product takes
    grid = (splits, heads, batch) if splits else (programs,)
    cut = splits != 1  # whether outputs are merged from several programs
    slots = (batch * heads * splits if splits else 2 * programs) * rows if cut else 1
    out = torch.empty((batch, query_heads, 1, size), dtype=query.dtype, device=query.device)
    scratch = torch.empty(slots * (size + 2), dtype=torch.float32, device=query.device)
    scratch_m, scratch_l = scratch[slots * size :], scratch[slots * (size + 1) :]
    pdl = query.is_cuda and _has_dependent_launch(query.device)
    dependent = {"launch_pdl": True} if pdl else {}
    width = 1 if spans is None else triton.next_power_of_2(batch)
    shared = {
        "SPANS": spans is not None, "BATCH": width, "FIXED": splits > 0, "ROWS": rows, "H": size, "BN": tuning.tile,
        "PDL": pdl,
    }  # fmt: skip
    # Each warp by itself where what they end with is little to bring together; a product takes no fewer keys than 16.
    apart = min(tuning.warps, tuning.tile // 16) if rows * size <= 512 and query.itemsize == 2 else 1
    # Registers of a multiprocessor for two programs, this call's and the next one's, and the merge between them.
    limit = {"maxnreg": 224} if splits and torch.version.hip is None else {}
    with torch.cuda.device_of(query):  # Triton launches on the current GPU, wherever the tensors are
        _attend[grid](
            query, key, value, out, spans, scratch, scratch_m, scratch_l, *query.stride()[:2], *key.stride()[:3],
            *value.stride()[:3], scaling * LOG2E, batch, heads, length, group,
            **shared, M=height, W=apart, SAME=key.stride() == value.stride(), STAGES=tuning.stages,
            num_warps=tuning.warps, **dependent, **limit,
        )  # fmt: skip
        if cut:
            part = min(32, size)  # of a head, so that one warp merges it without a barrier
            together = min(32, triton.next_power_of_2(splits or 16))
            _merge[(query_heads, batch, size // part)](
                out, spans, scratch, scratch_m, scratch_l, batch, heads, length, group, programs, splits,
                **shared, D=part, S=together, num_warps=1, **dependent,
            )  # fmt: skip
    return out


def _has_dependent_launch(device: torch.device) -> bool:
    return torch.version.hip is None and capability(device) >= (9, 0)
