"""A rule of token reduction that reads importance and likeness off the attention graph: Zero-TPrune.

Source: Wang, Dedhia, Jha (CVPR 2024, arXiv 2305.17328). A head's attention is a graph in which each token votes for
those that it looks at; the votes, repeated, are weighted PageRank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from leanformers.errors import LeanError
from leanformers.kernels import token_votes
from leanformers.parts.token_reducers import rows
from leanformers.parts.token_rules import (
    RULES,
    Count,
    Rule,
    at_least,
    at_most,
    first_of,
    lowest,
    numbers,
    open_size,
    ranked,
    share_of,
)


class PageRank(Rule):
    """Drop tokens that are copies of more important ones, then keep those that most votes go to.

    At each place: one vote orders the tokens (I'); of the less important half those ``drop`` go whose keys are most
    like that of a token in the other half (S); then the share ``keep`` with the highest importance after ``votes``
    votes stays (I). One value of each per place.

    start: the first votes, with sqrt(length) times as much for the class token (``class``), or ``uniform``.
    variance: heads whose importance, scaled to mean 1, has a variance outside of these bounds do not count; null: all
    count. keep_last: the last real token ([SEP] of a text) always stays.
    """

    def __init__(
        self,
        places: int,
        specials: int,
        *,
        keep: Sequence[float],
        drop: Sequence[int],
        votes: Sequence[int],
        start: str = "class",
        variance: Sequence[float] | None = (0.01, 0.7),
        keep_last: bool = False,
    ) -> None:
        super().__init__(places, specials)
        self.keep = numbers("keep", keep, places, 1e-9, 1.0)
        self.drop = numbers("drop", drop, places, 0, 1 << 20, whole=True)
        self.votes = numbers("votes", votes, places, 1, 1000, whole=True)
        if start not in ("class", "uniform"):
            raise LeanError(f"start is {start!r}: give 'class' or 'uniform'.")
        if variance is not None and (len(variance) != 2 or not 0 <= variance[0] <= variance[1]):
            raise LeanError(f"variance is {variance!r}: give a lower and an upper bound, or null for none.")
        self.start, self.keep_last = start, keep_last
        self.variance = None if variance is None else (float(variance[0]), float(variance[1]))
        self.protected = specials + int(keep_last)

    def idle(self, place: int) -> bool:
        return self.keep[place] == 1.0 and self.drop[place] == 0

    def count(self, place: int, entering: Count, first: Count) -> Count:
        others = at_least(0, entering - self.protected)
        survivors = others - at_most(others // 2, self._drop(place, others))
        return at_most(entering, self.protected + share_of(self.keep[place], survivors))

    def _drop(self, place: int, like: Any) -> Any:
        """The number to drop in the S-stage, of the kind of ``like``."""
        return torch.full_like(like, self.drop[place]) if isinstance(like, Tensor) else self.drop[place]

    def scores(self, place: int, probabilities: Tensor, key: Tensor, real: Tensor | None) -> Tensor:
        alive = real
        found: Tensor | None = None
        if self.drop[place]:
            found = self.importance(probabilities, alive, 1, renormalise=False)
            gone = self.copies(place, found, key, real)
            alive = gone.logical_not() if real is None else real & gone.logical_not()
        if self.keep[place] < 1.0 or found is None:
            found = self.importance(probabilities, alive, self.votes[place], renormalise=bool(self.drop[place]))
        scores = found if alive is None else lowest(alive, found)
        if self.keep_last:
            scores = scores.masked_fill(_last(probabilities, real), float("inf"))
        return scores

    def attended(self, place: int, query: Tensor, key: Tensor, scaling: float, real: Tensor | None) -> Tensor | None:
        if not token_votes.fits(query, key):
            return None
        favoured, variance = self.start == "class", self.variance
        voting = partial(token_votes.votes, query, key, specials=self.specials, scaling=scaling, favoured=favoured)
        rounds, alive = self.votes[place], real
        found: Tensor | None = None
        if drop := self.drop[place]:
            found = voting(real, rounds=1)
            alive = token_votes.copies(
                found, key, real, drop=drop, specials=self.specials, variance=variance, keep_last=self.keep_last
            )
        if self.keep[place] < 1.0 or found is None:  # among survivors alone, the rows of attention sum to 1 again
            found = voting(alive, rounds=rounds)
        return token_votes.joined(found, alive, real, variance=variance, keep_last=self.keep_last)

    def importance(self, probabilities: Tensor, alive: Tensor | None, votes: int, *, renormalise: bool) -> Tensor:
        """Importance [batch, length] of the tokens in ``alive`` (bool [batch, length], None: all).

        renormalise: rows lose what they give to others than these, and sum to 1 again.
        """
        by_head = self.page_rank(probabilities, alive, votes, renormalise=renormalise)  # [batch, heads, length]
        if alive is None:
            size: Any = by_head.shape[-1]
            deviation = (by_head * size - 1).square()
        else:
            size = alive.sum(-1)[:, None, None].clamp(min=1)
            deviation = (by_head * size - 1).square() * alive[:, None]
        if self.variance is None:
            return by_head.square().mean(1).sqrt()
        variance = deviation.sum(-1, keepdim=True) / size  # [batch, heads, 1]
        counts = (variance >= self.variance[0]) & (variance <= self.variance[1])
        counts = (counts | counts.any(1, keepdim=True).logical_not()).to(by_head.dtype)  # if no head passes, all do
        return ((by_head.square() * counts).sum(1) / counts.sum(1)).sqrt()

    def page_rank(self, probabilities: Tensor, alive: Tensor | None, votes: int, *, renormalise: bool) -> Tensor:
        """s <- A^T s, ``votes`` times: [batch, heads, length], each head's sum 1."""
        batch, heads, length, _ = probabilities.shape
        start = probabilities.new_ones(batch, 1, 1, length)
        if self.start == "class":
            front = torch.arange(length, device=start.device) < self.specials
            size = float(length) if alive is None else alive.sum(-1)[:, None, None, None].to(start.dtype)
            start = torch.where(front, start * size**0.5, start)
        living = None if alive is None else alive.to(start.dtype)[:, None, None]  # [batch, 1, 1, length]
        share: Tensor | None = None
        if living is not None:
            start = start * living
            if renormalise:
                share = living / (probabilities @ living.transpose(-1, -2)).transpose(-1, -2).clamp(min=1e-20)
        s = (start / start.sum(-1, keepdim=True)).expand(batch, heads, 1, length)
        for _ in range(votes):  # what the dropped receive is 0 again at the next vote's share
            s = (s if share is None else s * share) @ probabilities
        if living is not None:
            s = s * living
        return (s / s.sum(-1, keepdim=True)).squeeze(2)

    def copies(self, place: int, found: Tensor, key: Tensor, real: Tensor | None) -> Tensor:
        """Which tokens the S-stage drops, bool [batch, length]. Features are the keys of all heads side by side."""
        batch, length = found.shape
        free = (torch.arange(length, device=found.device) >= self.specials).expand(batch, -1)
        if real is not None:
            free = free & real
        if self.keep_last:
            free = free & _last(key, real).logical_not()
        most = max(0, length - self.protected)
        half = open_size(most // 2)  # what is not there is masked
        size: Any = most if real is None else free.sum(-1, keepdim=True)  # [batch, 1]
        order = ranked(lowest(free, found))
        better = first_of(order, open_size(most - most // 2))
        place_of = torch.arange(half, device=found.device)
        worse = order.gather(1, (size - 1 - place_of).expand(batch, -1).clamp(min=0))  # the least important first
        features = key.transpose(1, 2).flatten(2).float()  # [batch, length, width]
        features = features * features.square().sum(-1, keepdim=True).clamp(min=1e-24).rsqrt()
        alike = rows(features, worse) @ rows(features, better).transpose(1, 2)  # [batch, half, length of better]
        if real is not None:
            there = torch.arange(better.shape[1], device=found.device) < size - size // 2  # [batch, better]
            alike = lowest(there[:, None], alike)
        nearest = lowest(place_of < size // 2, alike.amax(-1))
        chosen = worse.gather(1, ranked(nearest)[:, : self.drop[place]])
        counted = torch.arange(chosen.shape[1], device=found.device) < size // 2
        chosen = chosen.masked_fill(counted.logical_not(), length)
        marks = torch.zeros(batch, length + 1, dtype=torch.bool, device=found.device)
        return marks.scatter(1, chosen, torch.ones_like(chosen, dtype=torch.bool))[:, :length]

    def flops(self, place: int, tokens: int, heads: int, width: int) -> int:
        votes = self.votes[place] if self.keep[place] < 1.0 else 0
        flops, most = 0, max(0, tokens - self.protected)
        if self.drop[place]:
            votes += 2 if votes else 1  # the first vote, and the sums by which rows are renormalised
            flops += 2 * (most // 2) * (most - most // 2) * width
        return flops + 2 * votes * heads * tokens * tokens


def _last(like: Tensor, real: Tensor | None) -> Tensor:
    """Where the last real token stands, bool [1 or batch, length]; like: [batch, heads, length, …]."""
    place = torch.arange(like.shape[2], device=like.device)[None]
    if real is None:
        return place == like.shape[2] - 1
    return place == (place * real).amax(-1, keepdim=True)


RULES["page_rank"] = PageRank
