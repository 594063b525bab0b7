"""Hard attention: every query keeps the K keys that it attends to most.

Source: AxFormer (Nagarajan et al., 2022, arXiv 2010.03688), part A of the card axformer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from leanformers.errors import LeanError

_ROWS = 1024  # queries at a time: the scores of a long sequence are never held whole


class TopK(nn.Module):
    """A mixer (`parts.attention`): softmax over all visible keys, then all but the `k` largest probabilities become
    zero. They are not normalised again.

    A row that sees `k` keys or fewer stays as it was; equal probabilities stay together. What is masked has the
    probability 0 and never enters.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise LeanError(f"k is {k!r}; top-k attention keeps a whole number of keys, 1 at least.")
        self.k = k

    @classmethod
    def like(cls, attention: Any, **settings: Any) -> TopK:
        """For an attention of the anatomy; this mixer has no parameters, so any will do."""
        return cls(**settings)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        padding: torch.Tensor | None,
        causal: bool,
        scaling: float,
        dropout: float,
        position_bias: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        queries, keys = query.shape[2], key.shape[2]
        groups = query.shape[1] // key.shape[1]
        if groups > 1:  # grouped queries
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        if mask is None and causal:  # the last query sees every key
            ones = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
            mask = ones.tril(keys - queries)[None, None]
        whole = torch.compiler.is_compiling() or queries <= _ROWS
        starts = [0] if whole else range(0, queries, _ROWS)
        outputs = []
        for start in starts:
            rows = slice(None) if whole else slice(start, start + _ROWS)
            scores = query[:, :, rows] @ key.transpose(-1, -2) * scaling  # [batch, heads, rows, keys]
            if position_bias is not None:
                scores = scores + (position_bias if position_bias.shape[2] == 1 else position_bias[:, :, rows])
            visible = None if mask is None else mask if mask.shape[2] == 1 else mask[:, :, rows]
            probabilities = self._probabilities(scores, visible).to(value.dtype)
            if self.training:
                probabilities = functional.dropout(probabilities, dropout)
            outputs.append((probabilities @ value).transpose(1, 2))  # [batch, rows, heads, head_dim]
        return outputs[0] if whole else torch.cat(outputs, dim=1)

    def _probabilities(self, scores: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        scores = scores.float()
        if visible is None:
            probabilities = scores.softmax(-1)
        else:
            hidden = visible.logical_not()
            probabilities = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
            probabilities = probabilities.masked_fill(hidden, 0.0)  # a row that sees nothing
        several = probabilities
        if torch.compiler.is_compiling():  # the number of keys is open: k zeros make sure that there are k
            several = functional.pad(probabilities, (0, self.k))
        elif probabilities.shape[-1] <= self.k:
            return probabilities
        least = several.topk(self.k, dim=-1).values[..., -1:]
        return probabilities.masked_fill(probabilities < least, 0.0)

    def extra_repr(self) -> str:
        return f"k={self.k}"
