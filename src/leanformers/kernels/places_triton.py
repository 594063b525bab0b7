"""Triton kernels that find the real tokens of a padded batch, and that write a packed row back into one.

One launch each, where single operations of a library take a dozen of some microseconds: between two forward passes
nothing else hides them. `leanformers.packing.index` does the same in plain PyTorch. Imported only where Triton is used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MOST_READ = 1 << 27  # bytes in all: every program reads the rows before its own
_MOST_LENGTH = 8192  # a row is read at once
_AT_ONCE = 4096
_LONGEST = 1 << 32  # bits above are the longest row's


@triton.jit
def _find_kernel(
    mask_ptr, places_ptr, ranks_ptr, edges_ptr, counted_ptr, batch, length, most,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    here = columns < length
    before = tl.zeros([ROWS], tl.int32)
    longest = tl.zeros([ROWS], tl.int32)
    for first in range(0, row, ROWS):
        rows = first + tl.arange(0, ROWS)
        real = tl.load(
            mask_ptr + rows[:, None] * length + columns[None, :],
            mask=(rows < row)[:, None] & here[None, :],
            other=0,
        )
        counts = tl.sum((real != 0).to(tl.int32), 1)
        before += counts
        longest = tl.maximum(longest, counts)
    start = tl.sum(before, 0)

    mine = (tl.load(mask_ptr + row * length + columns, mask=here, other=0) != 0).to(tl.int32)
    count = tl.sum(mine, 0)
    ranks = start + tl.cumsum(mine, 0) - 1
    real = here & (mine != 0)
    tl.store(ranks_ptr + row * length + columns, tl.where(real, ranks, -1), mask=here)
    tl.store(places_ptr + ranks, (row * length + columns).to(tl.int64), mask=real & (ranks < most))
    end = start + count
    tl.store(edges_ptr + row + 1, end)
    if row == 0:
        tl.store(edges_ptr, 0)
    if row == batch - 1:
        most_of_all = tl.maximum(tl.max(longest, 0), count)
        tl.store(counted_ptr, (most_of_all.to(tl.int64) << 32) | end.to(tl.int64))
        for first in range(end, most, AT_ONCE):
            left = first + tl.arange(0, AT_ONCE)
            tl.store(places_ptr + left, tl.zeros([AT_ONCE], tl.int64), mask=left < most)


def takes(mask: torch.Tensor) -> bool:
    """Whether `find` is for masks [batch, length] of this shape."""
    batch, length = mask.shape
    return 0 < length <= _MOST_LENGTH and 0 < batch * batch * length <= _MOST_READ


def find(mask: torch.Tensor, most: int, counted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the real tokens of a mask [batch, length] stand, row by row.

    Args:
        mask: bool, contiguous, True where a token is real.
        most: how many places are returned; further ones are left out, missing ones are 0.
        counted: int64 [1], where `numbers` finds the count; pinned memory of the host will do.

    Returns:
        places int64 [most] in the flattened batch; ranks int32 [batch, length], the place among the real ones, -1
        where none is; edges int32 [batch + 1], where each row's begin and the last one's end.
    """
    batch, length = mask.shape
    places = torch.empty(most, dtype=torch.int64, device=mask.device)
    ranks = torch.empty(batch, length, dtype=torch.int32, device=mask.device)
    edges = torch.empty(batch + 1, dtype=torch.int32, device=mask.device)
    width = triton.next_power_of_2(length)
    _find_kernel[(batch,)](
        mask.view(torch.int8), places, ranks, edges, counted, batch, length, most,
        ROWS=max(1, _AT_ONCE // width), WIDTH=width, AT_ONCE=_AT_ONCE, num_warps=8,
    )  # fmt: skip
    return places, ranks, edges


def numbers(counted: int) -> tuple[int, int]:
    """How many tokens are real, and how many in the row that has the most, of what `find` left."""
    return counted % _LONGEST, counted // _LONGEST


@triton.jit
def _spread_kernel(
    packed_ptr, ranks_ptr, out_ptr, tokens, places, length, width, features,
    FEATURES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < places
    ranks = tl.load(ranks_ptr + rows // width * length + rows % width, mask=inside, other=-1)
    columns = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    here = columns < features
    real = (ranks >= 0) & (ranks < tokens)
    values = tl.load(
        packed_ptr + ranks.to(tl.int64)[:, None] * features + columns[None, :],
        mask=real[:, None] & here[None, :],
        other=0.0,
    )
    tl.store(
        out_ptr + rows.to(tl.int64)[:, None] * features + columns[None, :],
        values,
        mask=inside[:, None] & here[None, :],
    )


def spread(packed: torch.Tensor, ranks: torch.Tensor, tokens: int, width: int) -> torch.Tensor:
    """packed [at least tokens, features], ranks [batch, at least width] of `find` -> [batch, width, features].

    Zeros where there is padding.
    """
    features = packed.shape[1]
    batch, length = ranks.shape
    packed = packed.contiguous()
    out = packed.new_empty(batch, width, features)
    block = min(triton.next_power_of_2(features), 1024)
    rows = max(1, 4096 // block)
    grid = (triton.cdiv(batch * width, rows), triton.cdiv(features, block))
    _spread_kernel[grid](
        packed, ranks, out, tokens, batch * width, length, width, features, FEATURES=block, ROWS=rows, num_warps=4
    )
    return out
