"""Which tokens of a padded batch are real, worked out once per forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass(frozen=True, eq=False)
class Index:
    """The real tokens of a batch [batch, length], row by row.

    places: int64 [tokens], where each stands in the flattened batch. cu_seqlens: int32 [batch + 1], where each
    sequence begins and the last one ends. max_length: of the longest sequence.
    """

    places: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int
    batch: int
    length: int

    @classmethod
    def of(cls, mask: torch.Tensor) -> Index:
        """Read a mask [batch, length] that is not 0 where a token is real; padding may stand anywhere.

        The lengths are what a GPU is waited for, once.
        """
        real = mask != 0
        lengths = real.sum(1).tolist()
        flat = real.reshape(-1)
        # On a GPU nonzero() would wait a second time, to learn what is known by now.
        places = torch.nonzero_static(flat, size=sum(lengths))[:, 0] if flat.is_cuda else flat.nonzero()[:, 0]
        edges = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(mask.device, non_blocking=True)
        longest = max(lengths, default=0)
        return cls(places=places, cu_seqlens=edges, max_length=longest, batch=mask.shape[0], length=mask.shape[1])

    @property
    def tokens(self) -> int:
        return self.places.shape[0]

    @staticmethod
    def holes(mask: torch.Tensor) -> bool:
        """Whether padding stands between real tokens of a row; a GPU is waited for."""
        real = mask != 0
        begins = real[:, :1].sum(1) + (real[:, 1:] & ~real[:, :-1]).sum(1)
        return bool((begins > 1).any())

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """[batch, length, ...] -> [1, tokens, ...]."""
        return padded.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, at least tokens, ...] -> [batch, length, ...], zeros where there is padding."""
        rest = packed.shape[2:]
        padded = packed.new_zeros(self.batch * self.length, *rest)
        padded.index_copy_(0, self.places, packed[0, : self.tokens])
        return padded.view(self.batch, self.length, *rest)
