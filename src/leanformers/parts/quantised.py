"""A linear layer with int8 weights, quantised by torchao and held as plain tensors."""

from collections.abc import Callable

import torch
from torch import nn

from leanformers.errors import LeanError
from leanformers.parts.dense import adopt, dense, empty
from leanformers.parts.int8 import dynamic_linear, float_linear
from leanformers.parts.torchao import quantise_rows

SCHEMES = ("int8_weight_only", "int8_dynamic")


def check_scheme(scheme: str) -> str:
    """Returns a known scheme; raises LeanError for another."""
    if scheme not in SCHEMES:
        raise LeanError(f"The quantisation scheme {scheme!r} is unknown; choose one of: {', '.join(SCHEMES)}.")
    return scheme


class Int8Rows(nn.Module):
    """A matrix `W~ = scale * qdata` of int8 rows with a float32 scale each, in two plain buffers.

    The dtype is that in which `weight` is read; `.to(dtype)` changes it and leaves the two buffers as they
    are, since a rounded scale would be another weight.
    """

    qdata: torch.Tensor  # int8 [rows, columns]
    scale: torch.Tensor  # float32 [rows, 1]

    def __init__(
        self,
        rows: int,
        columns: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dtype = dtype or torch.get_default_dtype()
        self.register_buffer("qdata", torch.zeros((rows, columns), dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones((rows, 1), dtype=torch.float32, device=device))

    def dequantise(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`scale * qdata`, float `[rows, columns]`."""
        return (self.qdata * self.scale).to(dtype or self.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised matrix, computed on each reading; writing to it changes nothing."""
        return self.dequantise()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Int8Rows":
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
        return self


class QuantisedLinear(Int8Rows):
    """`y = x W~^T + b` with int8 weights (card quantization, 1 and 2).

    Quantising is torchao's; loading and running need no torchao. With the scheme `int8_dynamic` each token
    of the input is rounded to int8 as well, at run time. The gradient with respect to the input flows
    (straight through the rounding); the weights are fixed. The output has the dtype of the input.

    Args:
        scheme: `"int8_weight_only"` or `"int8_dynamic"`.
        dtype: of the bias, and of `weight` when it is read.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: str = "int8_weight_only",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, device, dtype)
        self.in_features, self.out_features, self.scheme = in_features, out_features, check_scheme(scheme)
        zeros = torch.zeros(out_features, dtype=self.dtype, device=device) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros)

    @classmethod
    def like(cls, old: nn.Module, scheme: str = "int8_weight_only") -> "QuantisedLinear":
        """An unfilled part of the shape, dtype and device of `old` (`nn.Linear`, `Conv1D`); no torchao."""
        weight, bias = dense(old)
        part = cls(weight.shape[1], weight.shape[0], bias is not None, scheme, weight.device, weight.dtype)
        if bias is not None:
            part.bias = empty(tuple(bias.shape), bias)
        adopt(part, old)
        return part

    @torch.no_grad()
    def carry(self, old: nn.Module) -> None:
        """Quantises the weights of `old` (`nn.Linear` or `Conv1D`) and copies its bias.

        The weights of `int8_dynamic` keep to -64 ... 63 (torchao's `reduce_range`): CPUs without VNNI can
        multiply them by full int8 activations without overflow, and every machine means the same result.

        Raises:
            LeanError: torchao is not installed, or the weights hold a NaN or an infinity.
        """
        weight, bias = dense(old)
        qdata, scale = quantise_rows(weight, reduce_range=self.scheme == "int8_dynamic")
        self.qdata.copy_(qdata)
        self.scale.copy_(scale)
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        product = dynamic_linear if self.scheme == "int8_dynamic" else float_linear
        return product(hidden_states, self.qdata, self.scale, self.bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, scheme={self.scheme}"
