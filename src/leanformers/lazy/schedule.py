"""Where a model prunes tokens and how many are left, as plain arithmetic.

``rates`` maps a layer to p, the share of the tokens it sees that the layers after it do not see.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from leanformers.anatomy import Anatomy
from leanformers.anatomy.flops import attention_flops, linear_flops


def spread(layers: int, places: int = 4) -> tuple[int, ...]:
    """The first layers of ``places`` equal parts of what lies behind the first quarter of the layers, or fewer; the
    last layer is never one, since nothing comes after it."""
    first = -(-layers // 4)
    chosen = {first + place * (layers - first) // places for place in range(places)}
    return tuple(sorted(layer for layer in chosen if layer < layers - 1))


def shares(rates: Mapping[int, float], layers: int) -> tuple[float, ...]:
    """The share of a prompt that each layer computes while it is read."""
    kept, found = 1.0, []
    for layer in range(layers):
        found.append(kept)
        kept *= 1 - rates.get(layer, 0.0)
    return tuple(found)


def mean_keep(rates: Mapping[int, float], layers: int) -> float:
    """The mean of `shares` over the layers."""
    return fmean(shares(rates, layers))


def predicted_speedup(anatomy: Anatomy, rates: Mapping[int, float], length: int) -> float:
    """FLOPs of the layers on a prompt of ``length`` tokens, over those with pruning and its scores.

    sum of 2 P |S| + 2 d |S|^2 (attention looks back only, so half the square) + 2 d |S| for the scores, with P the
    weights of a layer's linears and |S| the tokens that it sees.
    """

    def flops(share: float, index: int, scored: bool) -> float:
        layer, tokens = anatomy.layers[index], share * length
        total = 0.0
        for attention in layer.attentions():
            projections = {id(projection.module): projection for _, projection in attention.projections()}
            total += tokens * sum(linear_flops(projection.module) for projection in projections.values())
            total += share**2 * attention_flops(attention, length, length) / 2
            total += 2 * tokens * attention.num_attention_heads * attention.head_dim if scored else 0.0
        feed_forward = {id(projection.module): projection for _, projection in layer.feed_forward.projections()}
        return total + tokens * sum(linear_flops(projection.module) for projection in feed_forward.values())

    kept = shares(rates, len(anatomy.layers))
    dense = sum(flops(1.0, index, False) for index in range(len(kept)))
    return dense / sum(flops(share, index, rates.get(index, 0.0) > 0) for index, share in enumerate(kept))
