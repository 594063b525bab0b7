"""Taking rows and columns out of a linear of any make: Linear, Conv1D, low-rank, masked.

The one place that knows how each stores its weight, so that edits on heads and neurons compose with
factorised and masked linears, fused or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from leanformers.anatomy import is_conv1d, linear_shape
from leanformers.errors import LeanError
from leanformers.parts.dense_sparse import DenseSparseLinear
from leanformers.parts.linear import LowRankLinear
from leanformers.parts.masked import MaskedLinear, pack_bits
from leanformers.parts.quantised import QuantisedLinear


def _narrow(parameter: nn.Parameter | None, axis: int, index: torch.Tensor) -> nn.Parameter | None:
    if parameter is None:
        return None
    data = parameter.data.index_select(axis, index.to(parameter.device)).contiguous()
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


@dataclass(frozen=True)
class Cut:
    """What stays of a linear: output rows (``axis`` 0) or input columns (``axis`` 1), ascending int64."""

    path: str
    module: nn.Module
    axis: Literal[0, 1]
    index: torch.Tensor


def cut(cuts: Sequence[Cut]) -> None:
    """Make the cuts in place, all or none.

    Raises:
        LeanError: one of the linears cannot be cut so; nothing is changed.
    """
    for one in cuts:
        _check(one.module, one.axis, one.index, one.path)
    for one in cuts:
        _cut(one.module, one.axis, one.index)


def _check(module: nn.Module, axis: int, index: torch.Tensor, path: str) -> None:
    if isinstance(module, LowRankLinear):
        _check(module.down if axis else module.up, axis, index, path)
    elif isinstance(module, QuantisedLinear):
        raise LeanError(f"{path} is quantised and cannot be cut any more: make structural edits before quantising.")
    elif isinstance(module, DenseSparseLinear):
        raise LeanError(
            f"{path} holds a dictionary and cannot be cut any more: make structural edits before factorising."
        )
    elif isinstance(module, MaskedLinear) and axis == 1 and module.pattern != "unstructured" and not index.is_meta:
        group = int(module.pattern.split(":")[1])
        whole = index.view(-1, group) if len(index) % group == 0 else None
        if whole is None or (whole != whole[:, :1] // group * group + torch.arange(group)).any():
            raise LeanError(
                f"{path} holds a {module.pattern} mask along its inputs, which only whole groups of {group} "
                "can leave: prune before masking."
            )


def _cut(module: nn.Module, axis: int, index: torch.Tensor) -> None:
    """Weight [out, in] -> [len(index), in] or [out, len(index)], whichever way the module stores it."""
    size = len(index)
    if isinstance(module, LowRankLinear):
        _cut(module.down if axis else module.up, axis, index)
    else:
        part: Any = module
        mask = module.mask if isinstance(module, MaskedLinear) else None
        part.weight = _narrow(part.weight, 1 - axis if is_conv1d(module) else axis, index)
        if axis == 0:
            part.bias = _narrow(part.bias, 0, index)
        if mask is not None:
            part.mask_bits = pack_bits(mask.index_select(axis, index.to(mask.device)))
    if is_conv1d(module):
        setattr(module, "nx" if axis else "nf", size)
    else:
        setattr(module, "in_features" if axis else "out_features", size)


def row_parameters(module: nn.Module) -> int:
    """Parameters that one output row holds, its bias included."""
    bias = 0 if getattr(module, "bias", None) is None else 1
    inner = linear_shape(module.up)[1] if isinstance(module, LowRankLinear) else linear_shape(module)[1]
    return inner + bias


def column_parameters(module: nn.Module) -> int:
    """Parameters that one input column holds."""
    return linear_shape(module.down)[0] if isinstance(module, LowRankLinear) else linear_shape(module)[0]


def row_flops(module: nn.Module) -> int:
    """FLOPs of one output row on one token."""
    return 2 * (linear_shape(module.up)[1] if isinstance(module, LowRankLinear) else linear_shape(module)[1])


def column_flops(module: nn.Module) -> int:
    """FLOPs of one input column on one token."""
    return 2 * column_parameters(module)
