"""How many tokens stay after each layer, what that saves, and the one knob for both.

Source: the schedule and its arithmetic of Latency Adjustable Transformer Encoder (Kachuee, Sharifkhani, 2022, arXiv
2201.03327). A curve c_1 >= c_2 >= … in (0, 1] says how much of a text each layer needs; after layer l the share
r_l = c_l ** gamma of its tokens stays. gamma = 0 keeps all of them, and the speedup rises with gamma.

Counts are of multiply-adds in the layers: embeddings, poolers and heads are outside the formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from leanformers.errors import LeanError

ROUNDING = 1e-9
"""Taken off before rounding up, so that a share times a length that is whole but for rounding stays whole."""

_STEPS = 60  # of the bisection


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Multiply-adds of one layer: ``attention`` per token of its four projections, ``pairs`` per query and key,
    ``feed_forward`` per token. Of a plain layer 4 d², 2 d and 2 d f."""

    attention: int
    pairs: int
    feed_forward: int

    def of(self, entering: int, leaving: int) -> int:
        """With ``entering`` tokens in its attention and ``leaving`` in its feed-forward."""
        return entering * (self.attention + entering * self.pairs) + leaving * self.feed_forward


def rate(attention_curve: Sequence[float]) -> float:
    """The lambda >= 0 of exp(-lambda (l - 1)) that fits a curve over the layers l = 1, 2, …, by least squares on its
    logarithm; what is not positive counts as 1e-6."""
    logs = [math.log(min(1.0, max(value, 1e-6))) for value in attention_curve]
    below = sum(place * place for place in range(len(logs)))
    above = -sum(place * value for place, value in enumerate(logs))
    return max(0.0, above / below) if below else 0.0


def decay(rate: float, layers: int, shift: int = 0) -> tuple[float, ...]:
    """exp(-rate (l - 1 + shift)) for every layer: shift 1 lets the first layer drop tokens too."""
    return tuple(math.exp(-rate * (place + shift)) for place in range(layers))


def check_curve(curve: Sequence[float], layers: int) -> None:
    """Raises:
    LeanError: not one value per layer, one outside (0, 1], or one above that of the layer before.
    """
    if len(curve) != layers:
        raise LeanError(f"The curve has {len(curve)} values and the model {layers} layers: give one per layer.")
    before = 1.0
    for place, value in enumerate(curve):
        if not 0.0 < value <= before:
            raise LeanError(
                f"The curve's value of layer {place} is {value}, which is not above 0 and at most {before}: what a "
                "layer drops does not come back, so the values fall or stay."
            )
        before = value


def fractions(curve: Sequence[float], gamma: float) -> tuple[float, ...]:
    """The share of a text's tokens that stays after each layer.

    Raises:
        LeanError: gamma is below 0, which would keep more tokens than there are.
    """
    if not gamma >= 0.0:
        raise LeanError(f"gamma is {gamma}: give 0 (all tokens stay) or more.")
    return tuple(value**gamma for value in curve)


def lengths(keep: Sequence[float], length: int) -> list[int]:
    """Tokens that enter each layer, and last those that leave: max(1, ceil(share * length)), never more than before."""
    counts = [length]
    for share in keep:
        counts.append(min(counts[-1], max(1, math.ceil(share * length - ROUNDING))))
    return counts


def multiply_adds(costs: Sequence[LayerCost], keep: Sequence[float], length: int) -> int:
    """Of all layers on one text of ``length`` tokens."""
    counts = lengths(keep, length)
    return sum(cost.of(counts[place], counts[place + 1]) for place, cost in enumerate(costs))


def speedup(costs: Sequence[LayerCost], curve: Sequence[float], gamma: float, length: int) -> float:
    """K: multiply-adds of the layers with all tokens, over those with what gamma keeps."""
    dense = sum(cost.of(length, length) for cost in costs)
    return dense / multiply_adds(costs, fractions(curve, gamma), length)


def largest_speedup(costs: Sequence[LayerCost], curve: Sequence[float], length: int) -> float:
    """K when all that a curve lets go is gone: one token stays after each layer whose value is below 1."""
    gone = [1.0 if value == 1.0 else 0.0 for value in curve]
    return sum(cost.of(length, length) for cost in costs) / multiply_adds(costs, gone, length)


def gamma_for(target: float, costs: Sequence[LayerCost], curve: Sequence[float], length: int) -> float:
    """The least gamma (but for bisection) whose speedup is at least ``target`` on a text of ``length`` tokens.

    Raises:
        LeanError: target below 1, or above what the curve can reach at this length.
    """
    if not target >= 1.0:
        raise LeanError(f"The speedup is {target}: give 1 (all tokens stay) or more.")
    if target == 1.0:
        return 0.0
    most = largest_speedup(costs, curve, length)
    if target > most:
        raise LeanError(
            f"A speedup of {target:g} is out of reach: texts of {length} tokens become at most {most:.2f} times as "
            "fast, since the first layers' attention sees all tokens; ask for less, or use shift=1."
        )
    low, high = 0.0, 1.0
    while speedup(costs, curve, high, length) < target:
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if speedup(costs, curve, middle, length) >= target else (middle, high)
    return high
