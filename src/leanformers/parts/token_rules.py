"""Rules of token reduction: how many tokens stay in a layer, and which.

A rule is made once per model, for all layers that reduce (its places, 0, 1, … upwards), and holds plain numbers only.
`parts.token_reducers` asks it and does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from leanformers.errors import LeanError
from leanformers.parts.token_schedule import ROUNDING

Count = TypeVar("Count", int, Tensor)


class Rule:
    """What every rule answers.

    places: layers that reduce. specials: tokens at the front (class, distillation) that always stay. Settings follow
    by name; those that are lists run parallel to the places.

    keywords: arguments of the model's call that the rule takes, and the model does not see.
    """

    keywords: ClassVar[tuple[str, ...]] = ()

    def __init__(self, places: int, specials: int) -> None:
        self.places, self.specials = places, specials

    def __init_subclass__(cls) -> None:
        if "scores" in cls.__dict__ and "attended" not in cls.__dict__:  # other scores than the inherited kernel's
            cls.attended = Rule.attended  # type: ignore[method-assign]

    def call(self, inputs: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        """A call of the model begins with these inputs, and ``given`` of the keywords; it ends with nothing given."""

    def idle(self, place: int) -> bool:
        """Whether all tokens stay at this place: attention is then SDPA, and nothing is computed."""
        raise NotImplementedError

    def count(self, place: int, entering: Count, first: Count) -> Count:
        """Tokens that stay of ``entering`` real ones, where the text had ``first`` at its input: whole numbers, or
        int64 [batch]. It never falls when those rise."""
        raise NotImplementedError

    def scores(self, place: int, probabilities: Tensor, key: Tensor, real: Tensor | None) -> Tensor:
        """How much each token should stay, float32 [batch, length]; -inf never does.

        probabilities: float32 [batch, heads, length, length], without dropout; exactly 0 for keys that are padding.
        key: [batch, key/value heads, length, head_dim]. real: bool [batch, length], None where nothing is padding.
        """
        raise NotImplementedError

    def attended(self, place: int, query: Tensor, key: Tensor, scaling: float, real: Tensor | None) -> Tensor | None:
        """`scores` without probabilities, where a kernel works them out; query as key, with its own heads."""
        return None

    def flops(self, place: int, tokens: int, heads: int, width: int) -> int:
        """FLOPs of the matrix products of ``scores`` for one text; width: of the keys of all heads together."""
        return 0


def numbers(name: str, values: Any, places: int, low: float, high: float, *, whole: bool = False) -> tuple[Any, ...]:
    """A setting with one number per place.

    Raises:
        LeanError: another number of them, or one out of range.
    """
    listed = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else (values,)
    if len(listed) != places:
        raise LeanError(f"{name} has {len(listed)} values for {places} layers that reduce tokens: give one for each.")
    for value in listed:
        right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not right or not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            raise LeanError(f"{name} holds {value!r}: give {kind} from {low:g} to {high:g}.")
    return listed


def share_of(share: float, count: Count) -> Count:
    """The share of a count, rounded up."""
    if isinstance(count, Tensor):
        return (count.double() * share - ROUNDING).ceil().long()
    return math.ceil(count * share - ROUNDING)


def at_least(least: int, count: Count) -> Count:
    return count.clamp(min=least) if isinstance(count, Tensor) else max(least, count)


def at_most(most: Count, count: Count) -> Count:
    if isinstance(count, Tensor):
        return count.minimum(most) if isinstance(most, Tensor) else count.clamp(max=most)
    return min(most, count)


RULES: dict[str, Any] = {}
"""The rules by name: classes `(places, specials, **settings)`; a rule's file puts it here."""


def make_rule(name: str, places: int, specials: int, settings: Mapping[str, Any]) -> Rule:
    """Raises:
    LeanError: no such rule, or settings that it does not take.
    """
    for module in ("page_rank", "token_elimination"):
        import_module(f"leanformers.parts.{module}")

    if name not in RULES:
        raise LeanError(f"There is no rule {name!r} of token reduction: choose one of {', '.join(RULES)}.")
    try:
        rule: Rule = RULES[name](places, specials, **settings)
    except TypeError as error:
        raise LeanError(f"The rule {name!r} of token reduction does not take {dict(settings)}: {error}.") from None
    return rule


def lowest(real: Tensor, scores: Tensor) -> Tensor:
    """The scores with -inf where a token is not real."""
    return scores.masked_fill(real.logical_not(), float("-inf"))


def open_size(size: int) -> int:
    """At least 1, for what is masked anyway; 2 while a graph is traced, which would fix smaller sizes for good."""
    return max(2 if torch.compiler.is_compiling() else 1, size)


def ranked(scores: Tensor, size: int | None = None) -> Tensor:
    """The first ``size`` places (None: all) in falling order of their scores [batch, length]; of equal ones the first
    comes first. More than there are: the last one again."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order if size is None else first_of(order, size)


def first_of(order: Tensor, size: int) -> Tensor:
    """The first ``size`` columns of places [batch, length]; beyond the end the last one again."""
    if size <= order.shape[1] and not torch.compiler.is_compiling():
        return order[:, :size]
    # There a slice would have an export settle whether it is the whole.
    return order.index_select(1, torch.arange(size, device=order.device).clamp(max=order.shape[1] - 1))
