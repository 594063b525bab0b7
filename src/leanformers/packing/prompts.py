"""The prompts of a batch: where each of their tokens stands in packed rows, and where in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from leanformers.errors import LeanError


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts without padding, in the order in which they came.

    tokens: int64 [sum of lengths], end to end. owners, places: of each token, its prompt and its place in it.
    """

    tokens: torch.Tensor
    lengths: list[int]
    owners: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, ids: Any, mask: torch.Tensor | None, device: torch.device) -> Prompts:
        """Read token ids: a tensor [prompts, length] whose mask is not 0 at real tokens, wherever the padding stands,
        or one sequence of ids per prompt.

        Raises:
            LeanError: no prompt, an empty one, or a mask of another shape.
        """
        if isinstance(ids, torch.Tensor) and ids.dim() == 2:
            if mask is None:
                mask = torch.ones_like(ids)
            if mask.shape != ids.shape:
                raise LeanError(
                    f"attention_mask has the shape {list(mask.shape)}, input_ids {list(ids.shape)}: give one 0 or 1 "
                    "for every token."
                )
            real = mask != 0
            lengths = real.sum(1).tolist()
            tokens = ids[real].to(device)
        elif mask is not None:
            raise LeanError(
                "attention_mask belongs to a tensor of input_ids [prompts, length]: leave it out for lists."
            )
        else:
            if any(isinstance(row, str) for row in ids):
                raise LeanError('Prompts are token ids, not texts: give tokenizer(texts)["input_ids"].')
            rows = [torch.as_tensor(row, dtype=torch.int64).reshape(-1) for row in ids]
            lengths = [len(row) for row in rows]
            tokens = torch.cat(rows).to(device) if rows else torch.empty(0, dtype=torch.int64)
        if not lengths:
            raise LeanError("There is no prompt to prefill: give at least one.")
        if 0 in lengths:
            raise LeanError(f"Prompt {lengths.index(0)} has no tokens: leave it out, or begin it with a special token.")
        counts = torch.tensor(lengths)
        owners = torch.repeat_interleave(torch.arange(len(lengths)), counts)
        places = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
        return cls(tokens=tokens, lengths=lengths, owners=owners, places=places)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def cached(self) -> list[int]:
        """Tokens of each prompt that the packed pass computes: all but the last one, which the first step feeds."""
        return [length - 1 for length in self.lengths]

    def left_padded(self, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and attention_mask, int64 [prompts, longest]."""
        device = self.tokens.device
        ids = torch.full((len(self), self.longest), padding, device=device)
        mask = torch.zeros_like(ids)
        owners = self.owners.to(device)
        columns = (self.places + self.longest - torch.tensor(self.lengths)[self.owners]).to(device)
        ids[owners, columns] = self.tokens
        mask[owners, columns] = 1
        return ids, mask

    def rows(self, bins: Sequence[Sequence[int]], width: int) -> Rows:
        """The packed rows of these bins, each a list of prompts, for a cache of so many tokens per prompt."""
        cached = torch.tensor(self.cached)
        row_of, offset_of = torch.full((2, len(self)), -1)  # of each prompt; -1: in none of these bins
        for row, held in enumerate(bins):
            members = torch.tensor(held)
            row_of[members], offset_of[members] = row, cached[members].cumsum(0) - cached[members]
        size = max(sum(self.lengths[prompt] - 1 for prompt in held) for held in bins)
        here = ((self.places < cached[self.owners]) & (row_of[self.owners] >= 0)).nonzero()[:, 0]
        owners, places = self.owners[here], self.places[here]
        at = row_of[owners] * size + offset_of[owners] + places  # in the flattened rows
        source, positions, blocks, target = torch.zeros(4, len(bins) * size, dtype=torch.int64)
        blocks -= 1
        source[at], positions[at], blocks[at] = here, places, owners
        target[at] = owners * width + width - cached[owners] + places
        device, shape = self.tokens.device, (len(bins), size)
        filled = blocks >= 0
        return Rows(
            ids=self.tokens[source.to(device)].view(shape),
            positions=positions.view(shape).to(device),
            blocks=blocks.view(shape).to(device),
            filled=None if bool(filled.all()) else filled.nonzero()[:, 0].to(device),
            target=target[filled].to(device),
            lengths=[self.lengths[prompt] - 1 for held in bins for prompt in held],
        )


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed rows [rows, size]: ids, positions that restart with each prompt, and the prompt of each token (-1: none).

    filled: which places of the flattened rows hold a token, None for all. target: where those go in a cache
    [prompts, width] of left-padded prompts, flattened. lengths: of the prompts, as they stand.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    filled: torch.Tensor | None
    target: torch.Tensor
    lengths: list[int]

    def cu_seqlens(self) -> torch.Tensor:
        """Where each prompt of a single row begins and the last one ends, int32 [prompts + 1]."""
        edges = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return edges.to(self.ids.device, non_blocking=True)

    def mask(self) -> torch.Tensor:
        """Who sees whom, bool [rows, 1, size, size]: what stands before in the same prompt.

        Padding sees itself, or softmax would have nothing to share out.
        """
        size = self.ids.shape[1]
        before = torch.ones(size, size, dtype=torch.bool, device=self.ids.device).tril()
        same = self.blocks[:, :, None] == self.blocks[:, None]
        return (same & before)[:, None]
