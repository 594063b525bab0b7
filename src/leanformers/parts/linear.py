"""A linear layer as the product of two thin ones."""

import torch
from torch import nn

from leanformers.errors import LeanError
from leanformers.parts.dense import adopt, dense, empty


class LowRankLinear(nn.Module):
    """`y = up(down(x))`: the LED unit of the card greenformers, with no non-linearity between.

    Holds `rank * (in + out)` weights instead of `in * out`, and the bias on `up`. The two linears are
    ordinary `nn.Linear` modules, so that they can be masked, quantised or adapted in their turn.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        rank: width between the two, at least 1.
        bias: whether `up` has a bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise LeanError(f"rank is {rank}; a low-rank linear needs a rank of at least 1.")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def like(cls, old: nn.Module, rank: int) -> "LowRankLinear":
        """An unfilled part of the shape, dtype and device of `old` (`nn.Linear` or `Conv1D`)."""
        weight, bias = dense(old)
        out_features, in_features = weight.shape
        part = cls(in_features, out_features, rank, bias=bias is not None, device="meta")
        part.down.weight = empty((rank, in_features), weight)
        part.up.weight = empty((out_features, rank), weight)
        if bias is not None:
            part.up.bias = empty((out_features,), bias)
        adopt(part, old)
        return part

    @torch.no_grad()
    def carry(self, old: nn.Module, up: torch.Tensor | None = None, down: torch.Tensor | None = None) -> None:
        """Fills the factors: those given, or the best of this rank.

        Without factors the exact SVD in float32 is cut off at the rank, the nearest product in the
        Frobenius norm, and its spectrum split evenly, which keeps the gradients of both halves balanced.

        Args:
            old: the layer that is replaced, `nn.Linear` or `Conv1D`.
            up: `[out, rank]`, together with `down`.
            down: `[rank, in]`.
        """
        weight, bias = dense(old)
        if (up is None) != (down is None):
            raise LeanError("Only one of the factors up and down is given; give both or neither.")
        if up is None or down is None:
            if self.rank > min(weight.shape):
                raise LeanError(
                    f"rank {self.rank} is above {min(weight.shape)}, the full rank of this layer; lower it."
                )
            u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
            root = s[: self.rank].sqrt()
            up, down = u[:, : self.rank] * root, root[:, None] * vh[: self.rank]
        for name, factor, target in (("up", up, self.up.weight), ("down", down, self.down.weight)):
            if factor.shape != target.shape:
                raise LeanError(f"The factor {name} is {list(factor.shape)}; this layer needs {list(target.shape)}.")
            target.copy_(factor)
        if bias is not None:
            self.up.bias.copy_(bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(hidden_states))  # [..., in] -> [..., rank] -> [..., out]

    @property
    def weight(self) -> torch.Tensor:
        """The product `[out, in]`, computed on each reading: for code that looks at a weight or its dtype.

        Writing to it changes nothing; write to `up.weight` and `down.weight`.
        """
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.up.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
