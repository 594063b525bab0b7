"""The rule ``received`` of token reduction: keep what receives most attention, as much as a speedup leaves.

Source: Latency Adjustable Transformer Encoder (Kachuee, Sharifkhani, 2022, arXiv 2201.03327). After a layer the share
curve ** gamma of a text's tokens stays (`token_schedule`); gamma follows from the speedup that is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from leanformers.errors import LeanError
from leanformers.kernels import token_votes
from leanformers.parts.token_rules import RULES, Count, Rule, at_least, at_most, numbers, share_of
from leanformers.parts.token_schedule import LayerCost, check_curve, gamma_for, speedup


class Received(Rule):
    """Keep the tokens that receive most attention, averaged over heads and real queries.

    curve: of each layer, falling, in (0, 1]. costs: of each layer, multiply-adds [attention, pairs, feed_forward] as in
    `LayerCost`. length: tokens of a text that gains the speedup; a shorter one gains less. speedup: of the layers,
    where a call does not say another: ``model(**batch, speedup=3.0)``.

    gamma: what speedup comes to; a plain attribute, whose new value holds from the next call on.
    """

    keywords: ClassVar[tuple[str, ...]] = ("speedup",)

    def __init__(
        self,
        places: int,
        specials: int,
        *,
        curve: Sequence[float],
        costs: Sequence[Sequence[int]],
        length: int,
        speedup: float = 1.0,
    ) -> None:
        super().__init__(places, specials)
        self.curve = numbers("curve", curve, places, 0.0, 1.0)
        check_curve(self.curve, places)
        if len(costs) != places or any(len(cost) != 3 for cost in costs):
            raise LeanError(f"costs is {list(costs)}: give three numbers for each of the {places} layers.")
        self.costs = [LayerCost(attention=a, pairs=p, feed_forward=f) for a, p, f in costs]
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise LeanError(f"length is {length!r}: give the tokens of a text, a whole number from 1.")
        self.length = length
        self._gammas: dict[float, float] = {}
        self._asked: float | None = None  # gamma of the call that runs
        self.gamma = self.gamma_of(speedup)

    def gamma_of(self, wanted: Any) -> float:
        """The gamma of a speedup on a text of ``length`` tokens.

        Raises:
            LeanError: no number, below 1, or beyond what the curve reaches.
        """
        if isinstance(wanted, bool) or not isinstance(wanted, int | float):
            raise LeanError(f"The speedup is {wanted!r}: give a number, 1 (all tokens stay) or more.")
        if wanted not in self._gammas:
            self._gammas[wanted] = gamma_for(wanted, self.costs, self.curve, self.length)
        return self._gammas[wanted]

    def call(self, inputs: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        wanted = given.get("speedup")
        self._asked = None if wanted is None else self.gamma_of(wanted)

    def expected(self, length: int) -> float:
        """The speedup of the layers on a text of ``length`` tokens, as gamma stands."""
        return speedup(self.costs, self.curve, self.gamma, length)

    def share(self, place: int) -> float:
        """Of a text's tokens, after this place."""
        share: float = self.curve[place] ** (self.gamma if self._asked is None else self._asked)
        return share

    def idle(self, place: int) -> bool:
        return self.share(place) == 1.0

    def count(self, place: int, entering: Count, first: Count) -> Count:
        return at_most(entering, at_least(max(1, self.specials), share_of(self.share(place), first)))

    def attended(self, place: int, query: Tensor, key: Tensor, scaling: float, real: Tensor | None) -> Tensor | None:
        if not token_votes.fits(query, key):
            return None
        given = token_votes.votes(query, key, real, rounds=1, specials=0, scaling=scaling, favoured=False)
        return given.mean(1)  # each real query has an equal vote

    def scores(self, place: int, probabilities: Tensor, key: Tensor, real: Tensor | None) -> Tensor:
        if real is None:
            return probabilities.mean((1, 2))
        queries = real.to(probabilities.dtype)
        total = (probabilities * queries[:, None, :, None]).sum((1, 2))
        return total / (probabilities.shape[1] * queries.sum(1, keepdim=True).clamp(min=1.0))


RULES["received"] = Received
