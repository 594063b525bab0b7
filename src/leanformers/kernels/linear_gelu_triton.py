"""The Triton kernel of a linear with GELU: the product is activated where it was summed, and written once.

Tiles of outputs in groups that share rows in the L2 cache; float32 sums; tensor descriptors (TMA from Hopper on).
Either small programs, several to a multiprocessor, one of which activates while another multiplies; or large ones that
stay. Imported only where Triton is used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from leanformers.kernels.processors import multiprocessors


class Tiles(NamedTuple):
    """How a launch is cut: rows and columns of outputs, the step along the sum, warps per program, pipeline stages.

    staying: one program to a multiprocessor goes from tile to tile, and loads for the next while it activates the last.
    """

    rows: int
    columns: int
    step: int
    warps: int
    stages: int
    staying: bool


@triton.jit
def _tile(
    tile, x, weight, bias_ptr, out, down, across, columns,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    group = tile // (GROUP * across)
    tall = tl.minimum(down - group * GROUP, GROUP)
    first_row = (group * GROUP + (tile % (GROUP * across)) % tall) * ROWS
    first_column = (tile % (GROUP * across)) // tall * COLUMNS

    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(0, WIDTH, STEP):
        a = x.load([first_row, at])
        b = weight.load([first_column, at])
        sums = tl.dot(a, b.T, sums)

    column = first_column + tl.arange(0, COLUMNS)
    sums += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    # gelu(x) = relu(x) - |x| Phi(-|x|). A library's erf takes as long as a good part of the product; log2 Phi(-u) is
    # smooth, and this polynomial of ours (least worst error on [0, 6.5]) gives Phi(-u) to within 1e-5 of itself there.
    # Beyond, what is taken away stays 2.6e-10.
    u = tl.minimum(tl.abs(sums), 6.5)
    power = (((5.99365849e-05 - 1.75777677e-06 * u) * u - 0.000916362915) * u + 0.00844738539) * u - 0.053824503
    power = ((power * u - 0.45861572) * u - 1.15118015) * u - 1.00000381
    activated = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL) - u * tl.exp2(power)
    out.store([first_row, first_column], activated.to(out.dtype))


@triton.jit
def _linear_gelu_kernel(
    x, weight, bias_ptr, out, tokens, columns, programs,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    STAYING: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(tokens, ROWS), tl.cdiv(columns, COLUMNS)
    if STAYING:
        for tile in tl.range(tl.program_id(0), down * across, programs, flatten=True):
            _tile(tile, x, weight, bias_ptr, out, down, across, columns, WIDTH, ROWS, COLUMNS, STEP, GROUP)
    else:
        _tile(tl.program_id(0), x, weight, bias_ptr, out, down, across, columns, WIDTH, ROWS, COLUMNS, STEP, GROUP)


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """x [tokens, width], weight [columns, width], bias [columns] -> [tokens, columns]; contiguous, rows of 16 bytes."""
    tokens, width = x.shape
    columns = weight.shape[0]
    out = x.new_empty(tokens, columns)
    programs = triton.cdiv(tokens, tiles.rows) * triton.cdiv(columns, tiles.columns)
    if tiles.staying:
        programs = min(programs, multiprocessors(x.device))
    _linear_gelu_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [tiles.rows, tiles.step]),
        TensorDescriptor.from_tensor(weight, [tiles.columns, tiles.step]),
        bias, TensorDescriptor.from_tensor(out, [tiles.rows, tiles.columns]), tokens, columns, programs,
        WIDTH=width, ROWS=tiles.rows, COLUMNS=tiles.columns, STEP=tiles.step, GROUP=8, STAYING=tiles.staying,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out
