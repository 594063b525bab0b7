"""How much attention each token receives, and how unevenly: what token elimination ranks tokens by.

Source: Latency Adjustable Transformer Encoder (Kachuee, Sharifkhani, 2022, arXiv 2201.03327). The score of token j is
the mean, over heads and real queries, of the attention probability that it gets; scores of a text sum to 1. A layer's
attention context contribution (ACC) is the number of tokens times the median score: 1 where attention is spread
evenly, near 0 where a few tokens receive all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from leanformers.errors import LeanError
from leanformers.parts.attention import put_mixer, switch_on, take_mixer

if TYPE_CHECKING:
    from leanformers.anatomy import Anatomy

_ROWS = 512  # queries at a time: probabilities of long texts are never held whole


def received(
    query: Tensor, key: Tensor, *, scaling: float, real: Tensor | None = None, position_bias: Tensor | None = None
) -> Tensor:
    """The scores of a batch, float32 [batch, length]; 0 for padding.

    query: [batch, heads, length, head_dim]; key the same, or with the fewer heads of grouped queries. real: bool
    [batch, length], None where no token is padding. position_bias: [1 or batch, heads, length, length], added before
    the softmax.
    """
    heads, queries = query.shape[1], query.shape[2]
    if heads != key.shape[1]:
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
    total = query.new_zeros(query.shape[0], queries, dtype=torch.float32)
    for start in range(0, queries, _ROWS):
        rows = slice(start, start + _ROWS)
        scores = (query[:, :, rows] @ key.transpose(-1, -2)).float() * scaling  # [batch, heads, rows, length]
        if position_bias is not None:
            scores = scores + (position_bias if position_bias.shape[2] == 1 else position_bias[:, :, rows])
        if real is None:
            total += scores.softmax(-1).sum((1, 2))
        else:
            probabilities = scores.masked_fill(~real[:, None, None], float("-inf")).softmax(-1)
            total += (probabilities * real[:, None, rows, None]).sum((1, 2))
    counts = queries if real is None else real.sum(1, keepdim=True).clamp_min(1)
    return total / (heads * counts)


def contribution(scores: Tensor, real: Tensor | None = None) -> Tensor:
    """ACC of each text, [batch]: real tokens times the median of their scores [batch, length], clipped to [0, 1].

    Of an even number of tokens the median is the mean of the two in the middle.
    """
    if real is None:
        real = torch.ones_like(scores, dtype=torch.bool)
    ordered = scores.masked_fill(~real, float("inf")).sort(dim=1).values
    counts = real.sum(1)
    places = torch.stack([(counts - 1) // 2, counts // 2], dim=1)  # [batch, 2]
    return (counts * ordered.gather(1, places).mean(1)).clamp(0.0, 1.0)


class Watcher(nn.Module):
    """A mixer (`parts.attention`) that attends as SDPA does and sums the ACC of the texts that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.texts, self.tokens = 0.0, 0, 0

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        padding: Tensor | None,
        causal: bool,
        scaling: float,
        dropout: float,
        position_bias: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        scores = received(query, key, scaling=scaling, real=padding, position_bias=position_bias)
        self.total += float(contribution(scores, padding).sum())
        self.texts += len(scores)
        self.tokens += scores.numel() if padding is None else int(padding.sum())
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        seen = None if padding is None else padding[:, None, None]
        if position_bias is not None:
            seen = position_bias if seen is None else position_bias.masked_fill(~seen, float("-inf"))
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
        return output.transpose(1, 2)

    @property
    def mean(self) -> float:
        """Raises:
        LeanError: no text has passed.
        """
        if not self.texts:
            raise LeanError("No text has passed the model, so nothing is known of its attention: give it texts.")
        return self.total / self.texts


@contextmanager
def watched(anatomy: Anatomy) -> Iterator[list[Watcher]]:
    """Inside, every forward pass of the model adds to the layers' ACC; afterwards the model is as it was.

    Raises:
        LeanError: the model computes its attention itself, or more than a watcher does.
    """
    name = type(anatomy.model).__name__
    if not anatomy.swappable_attention:
        raise LeanError(f"{name} computes its attention itself, where no one can watch it.")
    if (more := anatomy.more_than_softmax("position_bias")) is not None:
        raise LeanError(f"{name} {more}, so what its tokens receive is not watched: it takes plain attention.")
    before = switch_on(anatomy.model)
    watchers = [Watcher() for _ in anatomy.layers]
    try:
        for layer, watcher in zip(anatomy.layers, watchers, strict=True):
            put_mixer(layer.attention.module, watcher)
        yield watchers
    finally:
        for layer in anatomy.layers:
            take_mixer(layer.attention.module)
        switch_on(anatomy.model, before)
