"""A linear layer with weights that are zero and stay zero."""

import re

import torch
from torch import nn
from torch.nn import functional as F

from leanformers.errors import LeanError
from leanformers.parts.dense import adopt, dense, empty


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Eight booleans to the byte, the first in the lowest bit: bool of any shape -> uint8 `[ceil(n / 8)]`."""
    bits = F.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).reshape(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits << places).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `pack_bits`: uint8 `[ceil(n / 8)]` -> bool of the given shape."""
    # Not by shifting, for which exporters have no operation.
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] & places) != 0  # [bytes, 8]
    count = 1
    for size in shape:
        count *= size
    return bits.reshape(-1)[:count].reshape(shape)


def parse_pattern(pattern: str, in_features: int) -> tuple[int, int] | None:
    """`"unstructured"` -> None; `"N:M"` -> (N, M): of every M consecutive inputs N are kept.

    Raises:
        LeanError: neither form, N above M, or `in_features` not divisible by M.
    """
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None:
        raise LeanError(f"The mask pattern {pattern!r} is unknown; write 'unstructured' or N:M such as '2:4'.")
    kept, group = int(match[1]), int(match[2])
    if not 1 <= kept <= group:
        raise LeanError(f"The mask pattern {pattern!r} keeps {kept} of {group}; N must lie between 1 and M.")
    if in_features % group:
        raise LeanError(f"The mask pattern {pattern!r} needs inputs in groups of {group}; the layer has {in_features}.")
    return kept, group


class MaskedLinear(nn.Linear):
    """An `nn.Linear` whose masked weights are exact zeros (card essential-sparsity).

    The weight stays dense and holds the zeros, so that inference is that of a plain linear, at its cost.
    The mask is kept beside it, one bit per weight, and is multiplied in wherever a gradient may be asked of
    the weight: masked entries then have a gradient of exactly zero, and neither momentum nor weight decay
    moves them from zero.

    Args:
        pattern: `"unstructured"`, or `"N:M"`: N weights kept of every M consecutive inputs of a row.
    """

    mask_bits: torch.Tensor  # uint8 [ceil(out * in / 8)]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        pattern: str = "unstructured",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        parse_pattern(pattern, in_features)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.pattern = pattern
        count = -(-out_features * in_features // 8)
        self.register_buffer("mask_bits", torch.full((count,), 255, dtype=torch.uint8, device=self.weight.device))

    @classmethod
    def like(cls, old: nn.Module, pattern: str = "unstructured") -> "MaskedLinear":
        """An unfilled part of the shape, dtype and device of `old` (`nn.Linear`, `Conv1D`), without zeros."""
        weight, bias = dense(old)
        out_features, in_features = weight.shape
        part = cls(in_features, out_features, bias is not None, pattern, device="meta")
        part.weight = empty((out_features, in_features), weight)
        if bias is not None:
            part.bias = empty((out_features,), bias)
        part.mask_bits = torch.full_like(part.mask_bits, 255, device=weight.device)
        adopt(part, old)
        return part

    @torch.no_grad()
    def carry(self, old: nn.Module, mask: torch.Tensor) -> None:
        """Takes over the old layer's weights where the mask is true.

        Args:
            old: the layer that is replaced, `nn.Linear` or `Conv1D`.
            mask: bool `[out, in]`, true where the weight is kept.
        """
        weight, bias = dense(old)
        self.weight.copy_(weight)
        if bias is not None:
            self.bias.copy_(bias)
        self.set_mask(mask)

    @torch.no_grad()
    def set_mask(self, mask: torch.Tensor) -> None:
        """Remembers the mask (bool `[out, in]`, true = kept) and zeroes the rest of the weight.

        Raises:
            LeanError: another shape or dtype, or a mask that does not follow the pattern.
        """
        if mask.dtype != torch.bool or mask.shape != self.weight.shape:
            raise LeanError(
                f"The mask is {mask.dtype} {list(mask.shape)}; this layer needs torch.bool {list(self.weight.shape)}."
            )
        structure = parse_pattern(self.pattern, self.in_features)
        if structure is not None:
            kept, group = structure
            if (mask.reshape(-1, group).sum(dim=1) != kept).any():
                raise LeanError(
                    f"The mask does not keep exactly {kept} of every {group} inputs, as {self.pattern} says."
                )
        mask = mask.to(self.weight.device)
        self.mask_bits.copy_(pack_bits(mask))
        self.weight.masked_fill_(~mask, 0)

    @property
    def mask(self) -> torch.Tensor:
        """Bool `[out, in]`, true where the weight is kept; unpacked on each reading."""
        return unpack_bits(self.mask_bits, (self.out_features, self.in_features))

    @property
    def density(self) -> float:
        """Share of the weights that are kept."""
        return self.mask.float().mean().item()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # The test is not self.training: a model in eval mode may be trained too, and would revive its zeros.
        trained = torch.is_grad_enabled() and self.weight.requires_grad
        if trained and not torch.compiler.is_exporting() and not torch.jit.is_tracing():
            return F.linear(input, self.weight * self.mask, self.bias)
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}"
