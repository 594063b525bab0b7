"""A linear layer as a few atoms of a dense dictionary per row: dense times semi-structured sparse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leanformers.errors import LeanError
from leanformers.parts.dense import adopt, dense, empty
from leanformers.parts.dictionary import Factors, factorise
from leanformers.parts.masked import pack_bits, unpack_bits

MODES = ("materialised", "factored")


def index_bits(rank: int) -> int:
    """Bits of one index into `rank` atoms."""
    return max(1, (rank - 1).bit_length())


def dense_sparse_bits(out_features: int, in_features: int, rank: int, width: int, nonzeros: int, bits: int) -> int:
    """Stored bits of the factors, the bias left out; `bits` of a value."""
    coefficients = out_features * nonzeros * (in_features // width)
    return bits * rank * in_features + coefficients * (bits + index_bits(rank))


def check_sizes(out_features: int, in_features: int, rank: int, width: int, nonzeros: int) -> str | None:
    """Why a linear cannot be factorised so, in one clause; None if it can."""
    if width < 1 or in_features % width:
        return f"blocks of {width} inputs do not divide its {in_features}"
    if nonzeros < 1 or rank < max(2, nonzeros):
        return f"{nonzeros} of {rank} atoms a row: take 1 at least, and as many atoms as that, 2 at least"
    return None


class DenseSparseLinear(nn.Module):
    """`y = W x + b`, W cut into blocks of `width` inputs, every row of a block a mix of few atoms (card dsformer).

    W[:, block b] = sum over t < nonzeros of values[:, b, t] * dictionary[b, index[:, b, t]]. Stored are the dictionary
    [blocks, rank, width], the values [out, blocks, nonzeros] and the indices, packed in ceil(log2 rank) bits each.
    Mode `materialised` multiplies W out once and keeps it, which saves disk and download but neither memory nor time;
    `factored` never does, and computes rank * in + nonzeros * blocks * out multiply-adds a row.

    For training, `loosen` puts a dense latent matrix in place of values and indices: each row takes the `nonzeros`
    largest, and the gradient reaches all (straight through). `settle` fixes which they are; `harden` goes back.
    """

    packed: Tensor  # uint8 [ceil(out * blocks * nonzeros * index bits / 8)]
    latent: nn.Parameter | None
    whole: Tensor | None
    pattern: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        width: int,
        nonzeros: int,
        bias: bool = True,
        mode: str = "materialised",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if (reason := check_sizes(out_features, in_features, rank, width, nonzeros)) is not None:
            raise LeanError(f"A dense-sparse linear of {out_features} x {in_features}: {reason}.")
        if mode not in MODES:
            raise LeanError(f"The mode {mode!r} is unknown; choose {' or '.join(MODES)}.")
        self.in_features, self.out_features, self.mode = in_features, out_features, mode
        self.rank, self.width, self.nonzeros, self.blocks = rank, width, nonzeros, in_features // width
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dictionary = nn.Parameter(torch.empty(self.blocks, rank, width, **made))
        self.values = nn.Parameter(torch.empty(out_features, self.blocks, nonzeros, **made))
        size = -(-out_features * self.blocks * nonzeros * index_bits(rank) // 8)
        self.register_buffer("packed", torch.zeros(size, dtype=torch.uint8, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, **made)) if bias else None
        self.register_parameter("latent", None)
        self.register_buffer("whole", None, persistent=False)  # W, kept from the first use on
        self.register_buffer("pattern", None, persistent=False)  # bool [blocks, out, rank], once settled
        self._seen: tuple[Any, ...] | None = None

    @classmethod
    def like(
        cls, old: nn.Module, rank: int, width: int, nonzeros: int, mode: str = "materialised"
    ) -> DenseSparseLinear:
        """An unfilled part of the shape, dtype and device of `old` (`nn.Linear` or `Conv1D`)."""
        weight, bias = dense(old)
        out_features, in_features = weight.shape
        part = cls(in_features, out_features, rank, width, nonzeros, bias is not None, mode, device="meta")
        part.dictionary = empty(tuple(part.dictionary.shape), weight)
        part.values = empty(tuple(part.values.shape), weight)
        part.packed = torch.zeros_like(part.packed, device=weight.device)
        if bias is not None:
            part.bias = empty((out_features,), bias)
        adopt(part, old)
        return part

    @torch.no_grad()
    def carry(self, old: nn.Module, factors: Factors | None = None) -> None:
        """Fill the factors: those given, or what alternating pursuit finds for the old layer's weight."""
        weight, bias = dense(old)
        self.fill(factors or factorise(weight, self.width, self.rank, self.nonzeros))
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)

    @torch.no_grad()
    def fill(self, factors: Factors) -> None:
        """Take these factors.

        Raises:
            LeanError: other shapes, or an index outside the dictionary or twice in a row.
        """
        for name, given, own in (
            ("dictionary", factors.dictionary, self.dictionary),
            ("values", factors.values, self.values),
            ("indices", factors.indices, self.values),
        ):
            if given.shape != own.shape:
                raise LeanError(f"The factor {name} is {list(given.shape)}; this layer needs {list(own.shape)}.")
        indices = factors.indices
        if int(indices.min()) < 0 or int(indices.max()) >= self.rank or bool((indices.diff(dim=-1) <= 0).any()):
            raise LeanError(f"The indices of a row must rise and lie below {self.rank}, the number of atoms.")
        self.dictionary.copy_(factors.dictionary)
        self.values.copy_(factors.values)
        places = torch.arange(index_bits(self.rank), device=indices.device)
        self.packed.copy_(pack_bits((indices[..., None] >> places & 1).bool()))

    @property
    def indices(self) -> Tensor:
        """int64 [out, blocks, nonzeros], unpacked on each reading."""
        bits = index_bits(self.rank)
        unpacked = unpack_bits(self.packed, (self.values.numel(), bits)).long()
        return (unpacked * 2 ** torch.arange(bits, device=unpacked.device)).sum(-1).view(self.values.shape)

    @property
    def weight(self) -> Tensor:
        """W [out, in], multiplied out on each reading; writing to it changes nothing."""
        if self.latent is not None:
            return (self.coefficients() @ self.dictionary).transpose(0, 1).flatten(1)
        rows = self._bags(self._places(), self.dictionary.flatten(0, 1), self.values.flatten(0, 1))
        return rows.view(self.out_features, self.in_features)

    @property
    def row_flops(self) -> int:
        """FLOPs of one row of the input, in this mode."""
        if self.mode == "materialised":
            return 2 * self.out_features * self.in_features
        return 2 * (self.rank * self.in_features + self.values.numel())

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.latent is not None or self.mode == "materialised":
            return F.linear(hidden_states, self._materialised(), self.bias)
        rows = hidden_states.reshape(-1, self.blocks, self.width)  # [rows, blocks, width]
        mixed = torch.einsum("tbw,brw->brt", rows, self.dictionary)  # [blocks, rank, rows]
        places = self._places().view(self.out_features, -1)
        outputs = self._bags(places, mixed.flatten(0, 1), self.values.flatten(1)).t()  # [rows, out]
        outputs = outputs if self.bias is None else outputs + self.bias
        return outputs.view(*hidden_states.shape[:-1], self.out_features)

    def _places(self) -> Tensor:
        """Rows of the flattened dictionary [blocks * rank, width]: [out * blocks, nonzeros]."""
        starts = torch.arange(self.blocks, device=self.packed.device) * self.rank
        return (self.indices + starts[:, None]).flatten(0, 1)

    @staticmethod
    def _bags(places: Tensor, table: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums of rows of a table, nothing larger than the sums being held."""
        return F.embedding_bag(places, table, per_sample_weights=weights.contiguous(), mode="sum")

    def _materialised(self) -> Tensor:
        trained = torch.is_grad_enabled() and (self.dictionary.requires_grad or self.values.requires_grad)
        if self.latent is not None or trained or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.weight
        tensors = (self.dictionary, self.values, self.packed)
        seen = tuple((t._version, t.data_ptr(), t.dtype) for t in tensors)
        if self.whole is None or seen != self._seen:
            with torch.inference_mode(False), torch.no_grad():  # what is kept may meet gradients of inputs later
                self.whole, self._seen = self.weight, seen
        return self.whole

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DenseSparseLinear:
        self.whole = None
        super()._apply(fn, recurse)
        return self

    @torch.no_grad()
    def scale(self, axis: int, factors: Tensor) -> None:
        """Multiply the outputs (axis 0, [out], the bias too) or the inputs (axis 1, [in])."""
        factors = factors.to(self.values)
        if axis == 1:
            self.dictionary.mul_(factors.view(self.blocks, 1, self.width))
            return
        self.values.mul_(factors[:, None, None])
        if self.bias is not None:
            self.bias.mul_(factors)

    # -- training --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def loosen(self, others: Tensor | None = None) -> None:
        """Train a latent matrix [blocks, out, rank] that starts at the values. It takes out * blocks * rank numbers.

        others: coefficients for what is zero now, scaled so that none of them enters a row at the start.
        """
        values, indices = self.values.transpose(0, 1), self.indices.transpose(0, 1)  # [blocks, out, nonzeros]
        latent = values.new_zeros(self.blocks, self.out_features, self.rank)
        if others is not None:
            latent.copy_(others)
            bound = 0.9 * values.abs().amin(-1, keepdim=True)
            latent.clamp_(-bound, bound)
        self.whole = None
        self.latent = nn.Parameter(latent.scatter_(-1, indices, values))

    @property
    def mask(self) -> Tensor:
        """Bool [blocks, out, rank]: the atoms that each row uses; `nonzeros` of them in every row and block."""
        if self.pattern is not None:
            return self.pattern
        if self.latent is None:
            used = torch.zeros(self.blocks, self.out_features, self.rank, dtype=torch.bool, device=self.packed.device)
            return used.scatter_(-1, self.indices.transpose(0, 1), True)
        return torch.zeros_like(self.latent, dtype=torch.bool).scatter_(-1, self._largest(), True)

    def coefficients(self) -> Tensor:
        """S [blocks, out, rank] of the latent matrix; its gradient reaches every entry until it is settled."""
        assert self.latent is not None
        if self.pattern is not None:
            return self.latent * self.pattern
        return _StraightThrough.apply(self.latent, self.mask)  # type: ignore[no-any-return]

    def _largest(self) -> Tensor:
        assert self.latent is not None
        return self.latent.detach().abs().topk(self.nonzeros, dim=-1, sorted=False).indices

    @torch.no_grad()
    def renormalise(self) -> None:
        """Atoms of unit norm, their scale in the latent matrix: magnitudes then compare. W stays."""
        assert self.latent is not None
        norms = self.dictionary.norm(dim=-1).clamp_min(1e-12)  # [blocks, rank]
        self.dictionary.div_(norms[..., None])
        self.latent.mul_(norms[:, None])

    @torch.no_grad()
    def settle(self) -> None:
        """Fix the pattern: what is outside it is zero, now and after each later call."""
        assert self.latent is not None
        self.pattern = self.mask
        self.latent.mul_(self.pattern)

    @torch.no_grad()
    def harden(self) -> None:
        """Put the latent matrix back into values and indices."""
        assert self.latent is not None
        indices = self._largest().sort(-1).values  # [blocks, out, nonzeros]
        values = self.latent.gather(-1, indices)
        self.latent, self.pattern = None, None
        self.fill(Factors(self.dictionary, values.transpose(0, 1), indices.transpose(0, 1)))

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{sizes}, width={self.width}, nonzeros={self.nonzeros}, mode={self.mode}"


class _StraightThrough(torch.autograd.Function):
    """latent * mask, whose gradient goes to all of the latent matrix."""

    @staticmethod
    def forward(context: Any, latent: Tensor, mask: Tensor) -> Tensor:
        return latent * mask

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
