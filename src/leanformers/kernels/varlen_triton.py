"""The Triton kernel of variable-length attention: one program per tile of queries, head and sequence.

Online softmax over tiles of keys in float32 (base 2), scores never leave the chip. Queries, keys and values are read
by their strides out of whatever holds them, so that views of a packed projection need no copy. A program whose tile
starts after the end of its sequence returns at once. Imported only where Triton is used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


class Tiles(NamedTuple):
    """How a launch is cut: queries and keys per tile, warps per program, stages of the pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _varlen_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, cu_ptr, bias_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head, bias_head, bias_row,
    scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    start = tl.load(cu_ptr + sequence).to(tl.int64)
    length = (tl.load(cu_ptr + sequence + 1) - start).to(tl.int32)
    first = tl.program_id(0) * QUERIES
    if first >= length:
        return

    rows = first + tl.arange(0, QUERIES)
    columns = tl.arange(0, KEYS)
    width = tl.arange(0, WIDTH)
    whole: tl.constexpr = WIDTH == HEAD_DIM
    in_head = width < HEAD_DIM
    scale = tl.cast(scale, tl.float32)  # a compiled graph hands it over in double precision
    in_rows = rows < length
    from_row = rows.to(tl.int64)[:, None]  # a long sequence's places do not fit into 32 bits

    q_at = q_ptr + start * q_token + head * q_head + from_row * q_token + width[None, :]
    if whole:
        q = tl.load(q_at, mask=in_rows[:, None], other=0.0)
    else:
        q = tl.load(q_at, mask=in_rows[:, None] & in_head[None, :], other=0.0)
    k_at = k_ptr + start * k_token + (head // GROUP) * k_head + columns[None, :] * k_token + width[:, None]
    v_at = v_ptr + start * v_token + (head // GROUP) * v_head + columns[:, None] * v_token + width[None, :]

    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, WIDTH], tl.float32)

    end = length
    if CAUSAL:
        end = tl.minimum(length, first + QUERIES)
    # Tiles that lie wholly inside need no mask: all but the last ones.
    inside = (tl.minimum(end, first) if CAUSAL else end) // KEYS * KEYS
    for low in range(0, inside, KEYS):
        at = tl.cast(low, tl.int64)
        if whole:
            k = tl.load(k_at + at * k_token)
        else:
            k = tl.load(k_at + at * k_token, mask=in_head[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        if BIAS:
            bias_at = bias_ptr + head * bias_head + from_row * bias_row + low + columns[None, :]
            scores += tl.load(bias_at, mask=in_rows[:, None], other=0.0).to(tl.float32) * 1.4426950408889634
        higher = tl.maximum(top, tl.max(scores, 1))
        shares = tl.math.exp2(scores - higher[:, None])
        fade = tl.math.exp2(top - higher)
        total = total * fade + tl.sum(shares, 1)
        mixed = mixed * fade[:, None]
        if whole:
            v = tl.load(v_at + at * v_token)
        else:
            v = tl.load(v_at + at * v_token, mask=in_head[None, :], other=0.0)
        mixed = tl.dot(shares.to(v.dtype), v, mixed, input_precision=PRECISION)
        top = higher
    for low in range(inside, end, KEYS):
        at = tl.cast(low, tl.int64)
        here = low + columns
        in_keys = here < length
        k = tl.load(k_at + at * k_token, mask=in_keys[None, :] & in_head[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        seen = in_keys[None, :]
        if CAUSAL:
            seen = seen & (here[None, :] <= rows[:, None])
        if BIAS:
            bias_at = bias_ptr + head * bias_head + from_row * bias_row + here[None, :]
            near = in_rows[:, None] & in_keys[None, :]
            scores += tl.load(bias_at, mask=near, other=0.0).to(tl.float32) * 1.4426950408889634
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shares = tl.math.exp2(scores - higher[:, None])
        fade = tl.math.exp2(top - higher)
        total = total * fade + tl.sum(shares, 1)
        mixed = mixed * fade[:, None]
        v = tl.load(v_at + at * v_token, mask=in_keys[:, None] & in_head[None, :], other=0.0)
        mixed = tl.dot(shares.to(v.dtype), v, mixed, input_precision=PRECISION)
        top = higher

    mixed = mixed / total[:, None]
    out_at = out_ptr + start * out_token + head * out_head + from_row * out_token + width[None, :]
    tl.store(out_at, mixed.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_head[None, :])


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
    *,
    causal: bool,
    scaling: float,
    bias: torch.Tensor | None,
    tiles: Tiles,
) -> torch.Tensor:
    """Shapes as in `leanformers.kernels.varlen_attention`, which checks them; `tiles` cuts the launch."""
    tokens, heads, head_dim = query.shape
    out = torch.empty((tokens, heads, head_dim), dtype=query.dtype, device=query.device)
    sequences = cu_seqlens.shape[0] - 1
    grid = ((max_length + tiles.queries - 1) // tiles.queries, heads, sequences)
    _varlen_attention_kernel[grid](
        query, key, value, out, cu_seqlens, query if bias is None else bias,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        out.stride(0), out.stride(1), 0 if bias is None else bias.stride(0), 0 if bias is None else bias.stride(1),
        scaling * LOG2E,
        GROUP=heads // key.shape[1], HEAD_DIM=head_dim, WIDTH=max(16, triton.next_power_of_2(head_dim)),
        QUERIES=tiles.queries, KEYS=tiles.keys, CAUSAL=causal, BIAS=bias is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out
