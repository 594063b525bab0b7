"""Which tokens of a padded batch are real, worked out once per forward pass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import accumulate

import torch

from leanformers.kernels.processors import runs_triton


@dataclass(frozen=True, eq=False)
class Index:
    """The real tokens of a batch [batch, length], row by row.

    places: int64 [tokens], where each stands in the flattened batch. cu_seqlens: int32 [batch + 1], where each
    sequence begins and the last one ends. max_length: of the longest sequence. ranks: int32 [batch, length], which
    token stands at each place, -1 where there is padding; only where a GPU found them beside the rest.
    """

    places: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int
    batch: int
    length: int
    ranks: torch.Tensor | None = None

    @staticmethod
    def lengths(mask: torch.Tensor) -> list[int]:
        """Real tokens of each row, which is what a GPU is waited for, once."""
        lengths: list[int] = (mask != 0).sum(1).tolist()
        return lengths

    @classmethod
    def of(cls, mask: torch.Tensor, lengths: list[int] | None = None) -> Index:
        """Read a mask [batch, length] that is not 0 where a token is real; padding may stand anywhere."""
        lengths = cls.lengths(mask) if lengths is None else lengths
        flat = (mask != 0).reshape(-1)
        # On a GPU nonzero() would wait a second time, to learn what is known by now.
        places = torch.nonzero_static(flat, size=sum(lengths))[:, 0] if flat.is_cuda else flat.nonzero()[:, 0]
        edges = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(mask.device, non_blocking=True)
        longest = max(lengths, default=0)
        return cls(places=places, cu_seqlens=edges, max_length=longest, batch=mask.shape[0], length=mask.shape[1])

    @classmethod
    def filled(cls, mask: torch.Tensor, tokens: int, max_length: int, counted: torch.Tensor | None = None) -> Index:
        """Read a mask without waiting for the GPU: filled up to so many tokens with ones that belong to no sequence.

        counted: int64 [1], where `kernels.places_triton.find` leaves the count; only where there are `ranks` then.
        """
        real = mask if mask.dtype == torch.bool else mask != 0
        batch, length = mask.shape
        if mask.is_cuda and runs_triton(mask.device):
            from leanformers.kernels.places_triton import find, takes

            if takes(mask):
                counted = torch.empty(1, dtype=torch.int64, device=mask.device) if counted is None else counted
                with torch.cuda.device_of(mask):
                    places, ranks, edges = find(real.contiguous(), tokens, counted)
                return cls(places, edges, max_length, batch, length, ranks)
        places = torch.nonzero_static(real.reshape(-1), size=tokens, fill_value=0)[:, 0]
        edges = torch.zeros(batch + 1, dtype=torch.int32, device=mask.device)
        torch.cumsum(real.sum(1), 0, dtype=torch.int32, out=edges[1:])
        return cls(places, edges, max_length, batch, length)

    def of_tokens(self, tokens: int) -> Index:
        """The same without what it was filled up with."""
        return dataclasses.replace(self, places=self.places[:tokens])

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

    def unpack(self, packed: torch.Tensor, width: int | None = None) -> torch.Tensor:
        """[1, at least tokens, ...] -> [batch, width, ...], zeros where there is padding; width: `length` or less."""
        width = self.length if width is None else width
        if self.ranks is not None and packed.is_cuda and not packed.requires_grad:
            from leanformers.kernels.places_triton import spread

            with torch.cuda.device_of(packed):
                states = spread(packed[0].flatten(1), self.ranks, self.tokens, width)
            return states.view(self.batch, width, *packed.shape[2:])
        packed = packed[0, : self.tokens]
        padded = packed.new_zeros(self.batch * self.length, *packed.shape[1:])
        row = packed.shape[1:].numel() * packed.element_size()
        if packed.is_cuda and not packed.requires_grad and row % 16 == packed.storage_offset() == 0:
            # Rows are copied number by number, so let a number be 16 bytes.
            packed = packed.contiguous()
            padded.view(torch.complex128).index_copy_(0, self.places, packed.view(torch.complex128))
        else:
            padded.index_copy_(0, self.places, packed)
        return padded.view(self.batch, self.length, *packed.shape[1:])[:, :width]
