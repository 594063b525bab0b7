"""Latency adjustable: tokens that receive little attention leave layer by layer; how many is chosen when serving.

Source: Kachuee, Sharifkhani (2022, arXiv 2201.03327). A token's score is the attention that it receives, mean over
heads and queries; a layer's attention context contribution (ACC) is the number of tokens times their median score, and
falls with depth. Its curve, an exponential fitted to it, says what share of the tokens each layer needs; raised to the
power gamma it is the schedule. The model is tuned with all tokens, then for a while with elimination on. Afterwards any
speedup is served by the same weights: ``model(**batch, speedup=3.0)``, or `set_speedup` for good.
Choices, where the paper was not at hand (no code was found): ACC is measured on training texts after the tuning with
all tokens, not during it; the schedule's power; a text keeps its share of its own tokens, whatever its batch is padded
to; a speedup is of the layers' multiply-adds on a text of ``length`` tokens, as in the paper's formula. Nothing is
sampled, and no gradient passes the choice. Encoders alone, read out at their first tokens (or a mean of what stays).
Cost: no parameters. The first layer sees all tokens, so short texts gain little. Layers that drop tokens write out the
probabilities of their attention, which SDPA does not give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from leanformers.anatomy import Anatomy, linear_flops
from leanformers.errors import LeanError
from leanformers.methods.base import Choice, Range, Saving, Subject, method, setting
from leanformers.parts.attention_received import watched
from leanformers.parts.token_reducers import reduction
from leanformers.parts.token_schedule import LayerCost, decay, largest_speedup, rate
from leanformers.surgery import ReduceTokens
from leanformers.surgery.edits.reduce_tokens import set_default

_KINDS = ("text-classification", "text-regression", "image-classification")
_FLAT = 1e-3  # a rate below it keeps nearly all tokens in every layer


@method(
    "latency-adjustable",
    stock=False,
    stage="structure",
    order=80,
    trains=True,
    needs=("labels",),
    suits={"kinds": _KINDS},
    paper="Kachuee, Sharifkhani (2022)",
)
@dataclass(frozen=True, kw_only=True)
class LatencyAdjustable:
    """Drop tokens that receive little attention, as many as a speedup asks for that can be changed when serving."""

    speedup: float = setting(2.0, low=1.0, help="of the layers' multiply-adds, where a call asks for no other")
    train_speedup: float | None = setting(None, low=1.0, help="while training; by default the same")
    dense_epochs: float = setting(3.0, low=0.0, help="passes with all tokens before; 0 where the model is tuned")
    epochs: float = setting(1.0, low=0.0, help="passes with elimination on")
    learning_rate: float = setting(5e-5, low=0.0, high=1.0, help="of both, peak")
    batch_size: int = setting(32, low=1, help="examples per step")
    samples: int = setting(256, low=1, help="texts on which attention is watched")
    length: int | None = setting(None, low=2, help="tokens of a text that gains the speedup; by default their mean")
    shift: int = setting(0, low=0, high=1, help="1: the first layer drops tokens too, which allows more")
    rate: float | None = setting(None, low=0.0, help="of the curve's decay; by default fitted to the attention")

    def __call__(self, subject: Subject) -> None:
        if self.dense_epochs:
            self._check(subject, observe(subject, self.samples)[1])  # refused now rather than when it is tuned
            self._train(subject, self.dense_epochs)
        anatomy = subject.anatomy
        contributions, mean = observe(subject, self.samples)
        length = self._check(subject, mean)
        fitted = rate(contributions) if self.rate is None else self.rate
        if fitted < _FLAT and max(self.speedup, self.train_speedup or 1.0) > 1.0:
            raise LeanError(
                "method 'latency-adjustable' found attention spread as evenly over the tokens in the last layer as in "
                f"the first ({', '.join(f'{value:.2f}' for value in contributions)}): tune it first, or set rate."
            )
        curve = decay(fitted, len(anatomy.layers), self.shift)
        settings = {
            "curve": list(curve),
            "costs": [[cost.attention, cost.pairs, cost.feed_forward] for cost in layer_costs(anatomy)],
            "length": length,
            "speedup": self.train_speedup or self.speedup,
        }
        subject.apply(_edit(settings))
        self._train(subject, self.epochs)
        set_speedup(subject.model, self.speedup)
        subject.notes["latency-adjustable"] = {
            "contributions": contributions,
            "rate": fitted,
            "length": length,
            "gamma": _rule(subject.model).gamma,
        }

    def _train(self, subject: Subject, epochs: float) -> None:
        subject.train(epochs=epochs, learning_rate=self.learning_rate, batch_size=self.batch_size)

    def _check(self, subject: Subject, mean: float) -> int:
        """The length that the speedup is meant for."""
        length = self.length or max(2, round(mean))
        if reason := self._unreachable(subject.anatomy, length):
            raise LeanError(f"method 'latency-adjustable' does not suit this model: {reason}.")
        return length

    def _unreachable(self, anatomy: Anatomy, length: int) -> str | None:
        """Why no curve reaches the speedups at this length; None if one may."""
        curve = decay(self.rate or 1.0, len(anatomy.layers), self.shift)
        most = largest_speedup(layer_costs(anatomy), curve, length)
        wanted = max(self.speedup, self.train_speedup or 1.0)
        if wanted <= most:
            return None
        more = "" if self.shift else ", or set shift to 1"
        return f"texts of {length} tokens become at most {most:.2f} times as fast; ask for less than {wanted:g}{more}"

    def refuses(self, anatomy: Anatomy, task: Any) -> str | None:
        if any(layer.attention.absent or layer.feed_forward.absent for layer in anatomy.layers):
            return "a layer has lost its attention or its feed-forward, between which tokens would leave"
        count = len(anatomy.layers)
        settings = {"curve": [1.0] * count, "costs": [[1, 1, 1]] * count, "length": 2}
        try:
            _edit(settings).cost(anatomy)
        except LeanError as error:
            return str(error).rstrip(".")
        return self._unreachable(anatomy, self.length or getattr(task, "max_length", None) or 128)

    def estimate(self, anatomy: Anatomy, length: int = 128) -> Saving:
        costs = layer_costs(anatomy)
        dense = sum(cost.of(length, length) for cost in costs)
        return Saving(flops=round(-2 * dense * (1 - 1 / self.speedup)))

    @classmethod
    def space(cls) -> dict[str, Choice | Range]:
        return {"speedup": Choice((1.5, 2.0, 3.0)), "dense_epochs": Choice((0.0,)), "samples": Choice((64,))}

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return [{"speedup": 1.5, "dense_epochs": 0.0, "samples": 64}]


def _edit(settings: dict[str, Any]) -> ReduceTokens:
    layers = tuple(range(len(settings["curve"])))
    return ReduceTokens(layers=layers, where="before_feed_forward", rule="received", settings=settings)


def layer_costs(anatomy: Anatomy) -> list[LayerCost]:
    """Multiply-adds of every layer, from its shapes as they are."""
    costs = []
    for layer in anatomy.layers:
        attention, part = layer.attention, layer.feed_forward
        inside, outside = (
            sum(linear_flops(anatomy.module(path)) for path in {projection.path for _, projection in projections}) // 2
            for projections in (attention.projections(), part.projections())
        )
        pairs = 2 * attention.num_attention_heads * attention.head_dim
        costs.append(LayerCost(attention=inside, pairs=pairs, feed_forward=outside))
    return costs


def observe(subject: Subject, samples: int) -> tuple[list[float], float]:
    """ACC of every layer, mean over that many training texts, and the mean number of their tokens."""
    subject.model.eval()
    with torch.inference_mode(), watched(subject.anatomy) as watchers:
        for batch in subject.calibration(samples, batch_size=min(samples, 32)):
            subject.task.forward(subject.model, batch)
    return [watcher.mean for watcher in watchers], watchers[0].tokens / watchers[0].texts


def set_speedup(model: Any, speedup: float) -> None:
    """Serve this speedup from now on, and where the model is saved and loaded again; weights stay as they are.

    Args:
        model: one that `latency-adjustable` was applied to, edited in place.
        speedup: how many times less the layers compute than without elimination; 1 or more.

    Raises:
        LeanError: the model has no elimination, or its curve does not reach the speedup.
    """
    _rule(model).gamma_of(speedup)
    set_default(model, speedup=speedup)


def _rule(model: Any) -> Any:
    found = reduction(model)
    if found is None or not hasattr(found.rule, "gamma_of"):
        raise LeanError(f"{type(model).__name__} drops no tokens by attention: apply latency-adjustable to it first.")
    return found.rule
