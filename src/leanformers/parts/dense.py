"""What the linear parts need to know of the layer that they replace: `nn.Linear`, or GPT-2's `Conv1D`."""

from typing import Any, NamedTuple

import torch
from torch import nn

from leanformers.errors import LeanError


class Dense(NamedTuple):
    """A linear layer read as one matrix, whichever way round its module stores it."""

    weight: torch.Tensor  # [out, in], a view of the module's own
    bias: torch.Tensor | None  # [out]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]


def dense(layer: nn.Module) -> Dense:
    """Reads an `nn.Linear` or a transformers `Conv1D` (weight `[in, out]`).

    Raises:
        LeanError: the layer is neither, or its weight is not a floating-point matrix.
    """
    weight: Any = getattr(layer, "weight", None)
    bias: Any = getattr(layer, "bias", None)
    if isinstance(layer, nn.Linear):
        pass
    elif type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):  # transformers', without importing it
        weight = weight.T
    else:
        raise LeanError(f"{type(layer).__name__} is not a linear layer; give the path of an nn.Linear or Conv1D.")
    if not weight.is_floating_point():
        raise LeanError(
            f"The weight of this {type(layer).__name__} is {weight.dtype}; only float weights can be edited."
        )
    return Dense(weight, bias)


def empty(shape: tuple[int, ...], like: torch.Tensor, requires_grad: bool | None = None) -> nn.Parameter:
    """An unfilled parameter of the dtype, device and `requires_grad` of `like`."""
    data = torch.empty(shape, dtype=like.dtype, device=like.device)
    return nn.Parameter(data, requires_grad=like.requires_grad if requires_grad is None else requires_grad)


def adopt(part: nn.Module, old: nn.Module) -> None:
    """Puts a fresh part into the training mode of the layer that it replaces."""
    part.train(old.training)
