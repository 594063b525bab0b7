"""Triton kernels of Zero-TPrune's choice: votes along the attention graph, copies among the keys, and what stays.

A program of `votes` works out the probabilities of one head from its queries and keys, a few rows at a time. For one
vote they stay in registers; for more they are rounded to half precision and held in memory of its own, which the caches
keep. `copies`, `joined` and `top` have a program for each input. Nothing is sorted: the value that the last of the best
has is found four bits at a time. Imported only where Triton is used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@triton.jit
def _part(x, part, PARTS: tl.constexpr):
    """One of some equal parts of a vector."""
    rows = tl.reshape(x, [PARTS, x.shape[0] // PARTS])
    return tl.sum(tl.where(tl.arange(0, PARTS)[:, None] == part, rows, tl.zeros_like(rows)), 0)


@triton.jit
def _first(value, count, among, SIZE: tl.constexpr):
    """The `count` of those in `among` that have the largest values; of equal ones the first come first.

    The count-th largest value is found four bits at a time, from the highest on.
    """
    bits = (value + 0.0).to(tl.uint32, bitcast=True)
    ordered = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)  # rises with the value
    digits = tl.arange(0, 16)
    least = tl.full([1], 0, tl.uint32)
    unit = tl.full([1], 1 << 28, tl.uint32)
    for _ in range(0, 8):
        tried = least + digits.to(tl.uint32) * unit
        enough = tl.sum((among[:, None] & (ordered[:, None] >= tried[None, :])).to(tl.int32), 0) >= count
        least = tl.max(tl.where(enough | (digits == 0), tried, tl.zeros_like(tried)), 0) + tl.zeros_like(least)
        unit = unit >> 4
    more = among & (ordered > least)
    equal = among & (ordered == least)
    left = count - tl.sum(more.to(tl.int32), 0)
    return more | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))


@triton.jit
def _probabilities(q_at, q_token, first, length, k, seen, scale, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
                   ROWS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Those of the queries from `first` on, [ROWS, places]."""
    rows = first + tl.arange(0, ROWS)
    width = tl.arange(0, WIDTH)
    inside = (rows < length)[:, None] & (width < HEAD_DIM)[None, :]
    q = tl.load(q_at + rows[:, None] * q_token + width[None, :], mask=inside, other=0.0)
    scores = tl.dot(q, k, input_precision=PRECISION) * scale
    scores = tl.where(seen[None, :], scores, float("-inf"))
    shares = tl.math.exp2(scores - tl.max(scores, 1)[:, None])
    return shares / tl.sum(shares, 1)[:, None]


@triton.jit
def _votes_kernel(
    q_ptr, k_ptr, alive_ptr, held_ptr, out_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, alive_batch, alive_token,
    length, specials, votes, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
    CLASS: tl.constexpr, HOLD: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    scale = tl.cast(scale, tl.float32)
    places = tl.arange(0, SIZE)
    width = tl.arange(0, WIDTH)
    seen = places < length
    if MASKED:
        seen = seen & (tl.load(alive_ptr + batch * alive_batch + places * alive_token, mask=seen, other=0) != 0)
    s = tl.where(seen, 1.0, 0.0)
    if CLASS:
        s = tl.where(places < specials, s * tl.sqrt(tl.sum(s, 0)), s)
    s = s / tl.sum(s, 0)
    k_at = k_ptr + batch * k_batch + (head // GROUP) * k_head + places[None, :] * k_token + width[:, None]
    k = tl.load(k_at, mask=(places < length)[None, :] & (width < HEAD_DIM)[:, None], other=0.0)
    q_at = q_ptr + batch * q_batch + head * q_head
    parts = (length + ROWS - 1) // ROWS
    held_at = held_ptr + ((batch * tl.num_programs(0) + head) * parts * ROWS + tl.arange(0, ROWS)[:, None]) * SIZE
    total = tl.zeros([ROWS, SIZE], tl.float32)
    for part in range(0, parts):
        p = _probabilities(q_at, q_token, part * ROWS, length, k, seen, scale, HEAD_DIM, WIDTH, ROWS, PRECISION)
        total += p * _part(s, part, SIZE // ROWS)[:, None]
        if HOLD:
            tl.store(held_at + part * ROWS * SIZE + places[None, :], p.to(held_ptr.dtype.element_ty))
    s = tl.sum(total, 0)
    if HOLD:
        tl.debug_barrier()  # what one thread wrote others read
        for _ in range(1, votes):
            total = tl.zeros([ROWS, SIZE], tl.float32)
            for part in range(0, parts):
                p = tl.load(held_at + part * ROWS * SIZE + places[None, :]).to(tl.float32)
                total += p * _part(s, part, SIZE // ROWS)[:, None]
            s = tl.sum(total, 0)
    s = s / tl.sum(s, 0)
    tl.store(out_ptr + (batch * tl.num_programs(0) + head) * length + places, s, mask=places < length)


@triton.jit
def _join(
    votes_ptr, batch, heads, length, seen, low, high, HEADS: tl.constexpr, SIZE: tl.constexpr, FILTER: tl.constexpr
):
    """The root of the mean square over the heads that count, [SIZE]; votes: [batch, heads, length]."""
    head = tl.arange(0, HEADS)
    places = tl.arange(0, SIZE)
    inside = (head < heads)[:, None] & seen[None, :]
    s = tl.load(votes_ptr + (batch * heads + head[:, None]) * length + places[None, :], mask=inside, other=0.0)
    counts = (head < heads).to(tl.float32)
    if FILTER:
        size = tl.maximum(tl.sum(seen.to(tl.float32), 0), 1.0)
        off = tl.where(inside, s * size - 1.0, 0.0)
        variance = tl.sum(off * off, 1) / size
        passes = tl.where((variance >= low) & (variance <= high), counts, 0.0)
        counts = tl.where(tl.sum(passes, 0) > 0, passes, counts)
    return tl.sqrt(tl.sum(s * s * counts[:, None], 0) / tl.sum(counts, 0))


@triton.jit
def _seen(mask_ptr, batch, mask_batch, mask_token, length, SIZE: tl.constexpr, MASKED: tl.constexpr):
    places = tl.arange(0, SIZE)
    seen = places < length
    if MASKED:
        seen = seen & (tl.load(mask_ptr + batch * mask_batch + places * mask_token, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _copies_kernel(
    votes_ptr, k_ptr, real_ptr, alive_ptr, k_batch, k_head, k_token, real_batch, real_token,
    heads, key_heads, length, specials, drop, low, high,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
    FILTER: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    low, high = tl.cast(low, tl.float32), tl.cast(high, tl.float32)
    places = tl.arange(0, SIZE)
    width = tl.arange(0, WIDTH)
    seen = _seen(real_ptr, batch, real_batch, real_token, length, SIZE, MASKED)
    found = _join(votes_ptr, batch, heads, length, seen, low, high, HEADS, SIZE, FILTER)
    free = seen & (places >= specials)
    if LAST:
        free = free & (places != tl.max(tl.where(seen, places, -1), 0))
    count = tl.sum(free.to(tl.int32), 0)
    half = count // 2
    chosen = _first(found, count - half, free, SIZE)
    less = free & (chosen == 0)
    better = chosen.to(tl.int32)

    k_at = k_ptr + batch * k_batch
    in_head = width < HEAD_DIM
    square = tl.zeros([SIZE], tl.float32)
    for head in range(0, key_heads):
        at = k_at + head * k_head + places[:, None] * k_token + width[None, :]
        k = tl.load(at, mask=(places < length)[:, None] & in_head[None, :], other=0.0).to(tl.float32)
        square += tl.sum(k * k, 1)
    norm = 1.0 / tl.maximum(tl.sqrt(square), 1e-12)
    nearest = tl.full([SIZE], float("-inf"), tl.float32)
    for part in range(0, (length + ROWS - 1) // ROWS):
        columns = part * ROWS + tl.arange(0, ROWS)
        alike = tl.zeros([SIZE, ROWS], tl.float32)
        for head in range(0, key_heads):
            at = k_at + head * k_head
            k = tl.load(
                at + places[:, None] * k_token + width[None, :],
                mask=(places < length)[:, None] & in_head[None, :], other=0.0,
            )  # fmt: skip
            other = tl.load(
                at + columns[None, :] * k_token + width[:, None],
                mask=(columns < length)[None, :] & in_head[:, None], other=0.0,
            )  # fmt: skip
            alike = tl.dot(k, other, alike, input_precision=PRECISION)
        alike = alike * _part(norm, part, SIZE // ROWS)[None, :]
        alike = tl.where(_part(better, part, SIZE // ROWS)[None, :] > 0, alike, float("-inf"))
        nearest = tl.maximum(nearest, tl.max(alike, 1))
    alive = seen & (_first(nearest * norm, tl.minimum(drop, half), less, SIZE) == 0)
    tl.store(alive_ptr + batch * length + places, alive, mask=places < length)


@triton.jit
def _joined_kernel(
    votes_ptr, alive_ptr, real_ptr, out_ptr, alive_batch, alive_token, real_batch, real_token,
    heads, length, low, high,
    HEADS: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr, REAL: tl.constexpr, FILTER: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    low, high = tl.cast(low, tl.float32), tl.cast(high, tl.float32)
    places = tl.arange(0, SIZE)
    alive = _seen(alive_ptr, batch, alive_batch, alive_token, length, SIZE, MASKED)
    found = _join(votes_ptr, batch, heads, length, alive, low, high, HEADS, SIZE, FILTER)
    found = tl.where(alive, found, float("-inf"))
    if LAST:
        real = _seen(real_ptr, batch, real_batch, real_token, length, SIZE, REAL)
        found = tl.where(places == tl.max(tl.where(real, places, -1), 0), float("inf"), found)
    tl.store(out_ptr + batch * length + places, found, mask=places < length)


@triton.jit
def _top_kernel(scores_ptr, counts_ptr, index_ptr, length, size, specials, SIZE: tl.constexpr, COUNTED: tl.constexpr):
    batch = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, SIZE)
    seen = places < length
    scores = tl.load(scores_ptr + batch * length + places, mask=seen, other=float("-inf"))
    scores = tl.where(places < specials, float("inf"), scores)
    count = size
    if COUNTED:
        count = tl.minimum(size, tl.load(counts_ptr + batch).to(tl.int32))
    stays = _first(scores, count, seen, SIZE)
    at = tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(index_ptr + batch * size + at, places.to(tl.int64), mask=stays)
    rest = tl.full([SIZE], 0, tl.int64) + length
    tl.store(index_ptr + batch * size + places, rest, mask=(places >= count) & (places < size))


def _padded(length: int) -> int:
    return max(64, triton.next_power_of_2(length))


def _heads(query: torch.Tensor) -> dict[str, int]:
    return {"HEAD_DIM": query.shape[-1], "WIDTH": max(16, triton.next_power_of_2(query.shape[-1]))}


def _strides(mask: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else (mask.stride(0), mask.stride(1))


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


def votes(
    query: torch.Tensor, key: torch.Tensor, alive: torch.Tensor | None, rounds: int, specials: int, scaling: float,
    start: bool, cut: tuple[int, int] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Shapes as in `leanformers.kernels.token_votes`, which checks them."""
    batch, heads, length, _ = query.shape
    out = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    size = _padded(length)
    rows, warps = cut or (32, 8 if size > 128 else 4)
    shape = (batch, heads, triton.cdiv(length, rows) * rows, size)
    held = torch.empty(shape, dtype=torch.float16, device=query.device) if rounds > 1 else out
    _votes_kernel[(heads, batch)](
        query, key, query if alive is None else alive, held, out,
        *query.stride()[:3], *key.stride()[:3], *_strides(alive), length, specials, rounds, scaling * LOG2E,
        GROUP=heads // key.shape[1], **_heads(query), SIZE=size, MASKED=alive is not None, CLASS=start,
        HOLD=rounds > 1, ROWS=rows, PRECISION=_precision(query.dtype), num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out


def copies(
    found: torch.Tensor, key: torch.Tensor, real: torch.Tensor | None, drop: int, specials: int,
    variance: tuple[float, float], last: bool, cut: tuple[int, int] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Bool [batch, length]: which of the real tokens are no copies of more important ones."""
    batch, heads, length = found.shape
    alive = torch.empty(batch, length, dtype=torch.bool, device=found.device)
    size = _padded(length)
    rows, warps = cut or (32, 8 if size > 128 else 4)
    low, high = variance
    _copies_kernel[(batch,)](
        found, key, alive if real is None else real, alive, *key.stride()[:3], *_strides(real),
        heads, key.shape[1], length, specials, drop, low, high,
        HEADS=triton.next_power_of_2(heads), **_heads(key), SIZE=size, MASKED=real is not None,
        FILTER=low <= high, LAST=last, ROWS=rows, PRECISION=_precision(key.dtype), num_warps=warps, num_stages=1,
    )  # fmt: skip
    return alive


def joined(
    found: torch.Tensor, alive: torch.Tensor | None, real: torch.Tensor | None,
    variance: tuple[float, float], last: bool,
) -> torch.Tensor:  # fmt: skip
    """Scores [batch, length] of votes by head [batch, heads, length]."""
    batch, heads, length = found.shape
    scores = torch.empty(batch, length, dtype=torch.float32, device=found.device)
    low, high = variance
    _joined_kernel[(batch,)](
        found, found if alive is None else alive, found if real is None else real, scores, *_strides(alive),
        *_strides(real), heads, length, low, high,
        HEADS=triton.next_power_of_2(heads), SIZE=_padded(length), MASKED=alive is not None, REAL=real is not None,
        FILTER=low <= high, LAST=last, num_warps=4,
    )  # fmt: skip
    return scores


def top(scores: torch.Tensor, size: int, specials: int, counts: torch.Tensor | None) -> torch.Tensor:
    """Ascending places [batch, size], int64."""
    batch, length = scores.shape
    index = torch.empty(batch, size, dtype=torch.int64, device=scores.device)
    _top_kernel[(batch,)](
        scores, scores if counts is None else counts, index, length, size, specials,
        SIZE=max(_padded(length), _padded(size)), COUNTED=counts is not None, num_warps=1,
    )  # fmt: skip
    return index
