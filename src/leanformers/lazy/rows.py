"""Rows of tensors that belong to tokens: kept in the order in which they came, found by the token's position."""

from __future__ import annotations

import torch
from torch import Tensor

_SLACK = 64  # slots that are free after the buffers grow, at least


class Rows:
    """Tensors [1, ..., tokens, width] of the same tokens, such as keys and values.

    Each token has a slot, the same in all tensors; ``slots`` [positions] says which, -1 where there is none.
    """

    def __init__(self) -> None:
        self.slots: Tensor | None = None
        self.buffers: tuple[Tensor, ...] = ()
        self.count = 0  # tokens that are here
        self._used = 0  # slots that were given out, of those who left too
        self._ordered = True  # whether later slots are of later positions

    def put(self, positions: Tensor, *tensors: Tensor, length: int, ordered: bool = True) -> None:
        """Add tokens that are not here yet.

        Args:
            positions: int64 [tokens], ascending. tensors: [1, ..., tokens, width], always as many.
            length: above every position. ordered: no position is below one that is here; if unknown, False.
        """
        added = len(positions)
        if not added:
            return
        self._ordered = ordered and (self._ordered or not self.count)
        self._make_room(tensors, added, length)
        for buffer, tensor in zip(self.buffers, tensors, strict=True):
            buffer.narrow(-2, self._used, added).copy_(tensor)
        assert self.slots is not None
        here = self.slots.device
        self.slots[positions.to(here)] = torch.arange(self._used, self._used + added, device=here)
        self._used += added
        self.count += added

    def has(self, positions: Tensor) -> Tensor:
        """Whether each of the positions is here, bool [tokens]."""
        if self.slots is None:
            return torch.zeros_like(positions, dtype=torch.bool)
        here, last = positions.to(self.slots.device), len(self.slots) - 1
        found = (self.slots[here.clamp_max(last)] >= 0) & (here <= last)  # later tokens may never have come by here
        return found.to(positions.device)

    def get(self, positions: Tensor) -> tuple[Tensor, ...]:
        """The tensors of these tokens, in the order given; all of them must be here. Ascending positions of all that
        ever came in ascending order are a view, anything else is copied."""
        if self._ordered and len(positions) == self.count == self._used:
            return tuple(buffer.narrow(-2, 0, self.count) for buffer in self.buffers)
        assert self.slots is not None
        slots = self.slots[positions.to(self.slots.device)]
        return tuple(buffer.index_select(-2, slots) for buffer in self.buffers)

    def take(self, positions: Tensor) -> tuple[Tensor, ...]:
        """The same as copies, and the tokens are here no longer."""
        assert self.slots is not None
        positions = positions.to(self.slots.device)
        slots = self.slots[positions]
        taken = tuple(buffer.index_select(-2, slots) for buffer in self.buffers)
        self.slots[positions] = -1
        self.count -= len(positions)
        if 2 * self.count < self._used:
            self._compact()
        return taken

    @property
    def positions(self) -> Tensor:
        """Of the tokens that are here, ascending, int64 [tokens]."""
        return torch.empty(0, dtype=torch.int64) if self.slots is None else (self.slots >= 0).nonzero()[:, 0]

    @property
    def bytes(self) -> int:
        """Of the tokens that are here, without free slots."""
        return self.count * sum(b.element_size() * b.shape[:-2].numel() * b.shape[-1] for b in self.buffers)

    def _compact(self) -> None:
        """Close the gaps of those who left."""
        positions = self.positions
        assert self.slots is not None
        self.buffers = tuple(buffer.index_select(-2, self.slots[positions]) for buffer in self.buffers)
        self.slots[positions] = torch.arange(self.count, device=positions.device)
        self._used, self._ordered = self.count, True

    def _make_room(self, tensors: tuple[Tensor, ...], added: int, length: int) -> None:
        needed = self._used + added
        if not self.buffers or self.buffers[0].shape[-2] < needed:
            capacity = needed + max(_SLACK, needed // 16)
            grown = tuple(t.new_empty(*t.shape[:-2], capacity, t.shape[-1]) for t in tensors)
            for new, old in zip(grown, self.buffers, strict=False):
                new.narrow(-2, 0, self._used).copy_(old.narrow(-2, 0, self._used))
            self.buffers = grown
        if self.slots is None or len(self.slots) < length:
            slots = torch.full((length + max(_SLACK, length // 16),), -1, device=tensors[0].device)
            if self.slots is not None:
                slots[: len(self.slots)] = self.slots
            self.slots = slots
