"""Folding factors of units into the weights around them: residual dimensions, heads, neurons, inputs of linears.

Nothing is cut and the ledger learns nothing: the weights hold the factors.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanformers.anatomy import Anatomy, Norm, is_conv1d
from leanformers.parts.dense_sparse import DenseSparseLinear
from leanformers.parts.linear import LowRankLinear


@torch.no_grad()
def scale_linear(module: nn.Module, axis: Literal[0, 1], factors: Tensor) -> None:
    """Multiply the outputs (``axis`` 0, [out_features], the bias too) or the inputs (1, [in_features]) of a linear
    or, outputs alone, of a convolution."""
    part: Any = module
    if isinstance(module, LowRankLinear):
        scale_linear(module.down if axis else module.up, axis, factors)
        return
    if isinstance(module, DenseSparseLinear):
        module.scale(axis, factors)
        return
    weight = part.weight.t() if is_conv1d(module) else part.weight
    factors = factors.to(weight.device, torch.float32)
    shape = [1] * weight.ndim
    shape[axis] = -1
    weight.copy_(weight.float() * factors.view(shape))
    if axis == 0 and part.bias is not None:
        part.bias.copy_(part.bias.float() * factors)


@torch.no_grad()
def scale_residual(anatomy: Anatomy, factors: Tensor) -> None:
    """Multiply what is written to the residual stream [hidden_size]: by attention and feed-forward, and at its start.

    The start is the norm of the embeddings where there is one, else every table and linear that writes it. A
    language-model head tied to the table reads the stream through the final norm, which then undoes the factors.
    """
    for writer in anatomy.residual.writes:
        scale_linear(writer.module, 0, factors)
    start = starting_norm(anatomy)
    if start is not None:
        _scale_norm(anatomy, start, factors)
        return
    for module in anatomy.residual.inputs.values():
        scale_linear(module, 0, factors)
    for table in anatomy.residual.tables.values():
        table.copy_(table.float() * factors.to(table.device, torch.float32))
    if tied_to_stream(anatomy):
        for norm in anatomy.final_norms:
            _scale_norm(anatomy, norm, 1 / factors)
        for output in anatomy.residual.outputs.values():
            if output.module is not anatomy.head:
                scale_linear(output.module, 1, factors)


def curved_start(anatomy: Anatomy) -> str | None:
    """Why no factors can be folded into the start of the stream, None where they can."""
    if anatomy.family.name == "whisper" and anatomy.residual.inputs:
        return "its stream starts with the GELU of a convolution"
    return None


def starting_norm(anatomy: Anatomy) -> Norm | None:
    """The norm [hidden_size] between the embeddings and the first layer, if there is one."""
    found = (norm for norm in anatomy.norms if norm.place == "embedding")
    return next((norm for norm in found if norm.module.weight.shape == (anatomy.hidden_size,)), None)


def tied_to_stream(anatomy: Anatomy) -> bool:
    """Whether the language-model head is one of the tables that write to the stream."""
    weight = getattr(anatomy.head, "weight", None)
    return any(weight is table for table in anatomy.residual.tables.values())


def _scale_norm(anatomy: Anatomy, norm: Norm, factors: Tensor) -> None:
    weight, bias = norm.module.weight, getattr(norm.module, "bias", None)
    factors = factors.to(weight.device, torch.float32)
    offset = 1 if anatomy.family.norm_offset else 0
    weight.copy_((weight.float() + offset) * factors - offset)
    if bias is not None:
        bias.copy_(bias.float() * factors)
