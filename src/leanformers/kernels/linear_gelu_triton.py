"""The Triton kernel of a linear with GELU: the product is activated where it was summed, and written once.

One program per tile of outputs, tiles in groups that share rows in the L2 cache; float32 sums; operands come by tensor
descriptors (TMA from Hopper on). Small programs, two to a multiprocessor, so that one computes its activation while
the other multiplies. Imported only where Triton is used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


class Tiles(NamedTuple):
    """How a launch is cut: rows and columns of outputs, the step along the sum, warps per program, pipeline stages."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


@triton.jit
def _linear_gelu_kernel(
    x, weight, bias_ptr, out_ptr, tokens, columns,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    down, across = tl.cdiv(tokens, ROWS), tl.cdiv(columns, COLUMNS)
    group = program // (GROUP * across)
    tall = tl.minimum(down - group * GROUP, GROUP)
    first_row = (group * GROUP + (program % (GROUP * across)) % tall) * ROWS
    first_column = (program % (GROUP * across)) // tall * COLUMNS

    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(0, WIDTH, STEP):
        a = x.load([first_row, at])
        b = weight.load([first_column, at])
        sums = tl.dot(a, b.T, sums)

    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    in_columns = column < columns
    sums += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    # A library's erf takes as long as a good part of the product; this is within 1.5e-7 of it, and relatively exact in
    # the tail below zero: erfc(z) by Abramowitz and Stegun, 7.1.26.
    z = tl.abs(sums) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    poly = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    beyond = 0.5 * sums * poly * tl.exp2(z * z * -1.4426950408889634)
    activated = tl.where(sums < 0.0, beyond, sums - beyond)
    at = out_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(at, activated.to(out_ptr.dtype.element_ty), mask=(row < tokens)[:, None] & in_columns[None, :])


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """x [tokens, width], weight [columns, width] and bias [columns] -> [tokens, columns]; all contiguous."""
    tokens, width = x.shape
    columns = weight.shape[0]
    out = x.new_empty(tokens, columns)
    grid = (triton.cdiv(tokens, tiles.rows) * triton.cdiv(columns, tiles.columns),)
    _linear_gelu_kernel[grid](
        TensorDescriptor.from_tensor(x, [tiles.rows, tiles.step]),
        TensorDescriptor.from_tensor(weight, [tiles.columns, tiles.step]),
        bias, out, tokens, columns, WIDTH=width,
        ROWS=tiles.rows, COLUMNS=tiles.columns, STEP=tiles.step, GROUP=8,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out
