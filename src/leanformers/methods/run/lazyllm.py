"""LazyLLM: each layer goes on with the tokens that the next one looks at; later steps may bring others back.

Source: Fu, Cho, Merth, Mehta, Rastegari, Najibi (2024, arXiv 2407.14057). After a chosen layer the tokens with the
lowest attention from the last token, mean over heads, are left out of all deeper layers of this step; their states
wait in a cache, so that a later step can finish them and no token passes a layer twice. Not retrained.
Deviations: the score is computed apart from the attention, which stays SDPA; the first token, an attention sink, is
never dropped. The paper tunes places and rates per task; here one setting serves all: after the first quarter of the
layers, four places that drop 30 % each.
Cost: of a prompt that is read, the mean over layers of the share that is left (notes: ``mean_keep``); a decoding
step with revivals is slower than a dense one. It acts in `generate` alone, for one sequence: a forward pass over a
text, and with it what a task measures, is the dense model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.lazy import mean_keep, predicted_speedup, spread
from leanformers.methods.base import Saving, Subject, method, setting
from leanformers.surgery import PrunePrompt

PROMPT = 1500
"""Tokens of the prompt for which the notes predict a speed-up."""


@method(
    "lazyllm",
    stage="quantise",
    order=80,
    suits={"kinds": ("causal-lm",)},
    paper="Fu et al. (2024)",
    stock=False,
)
@dataclass(frozen=True, kw_only=True)
class LazyLLM:
    """Read long prompts lazily: deeper layers see only the tokens that matter for the next one."""

    layers: tuple[int, ...] | None = setting(
        None, help="layers after which tokens are dropped; by default four, spread behind the first quarter"
    )
    rates: tuple[float, ...] = setting(
        (0.3,), help="share of the tokens seen that each of them drops; one value serves all"
    )

    def __post_init__(self) -> None:
        if not self.rates or not all(0 <= rate < 1 for rate in self.rates):
            raise LeanError(f"rates is {list(self.rates)}: give shares from 0 to below 1, one at least.")
        if self.layers is not None and len(self.rates) not in (1, len(self.layers)):
            raise LeanError(f"{len(self.layers)} layers and {len(self.rates)} rates: give one rate, or one per layer.")

    def __call__(self, subject: Subject) -> None:
        anatomy = subject.anatomy
        rates = self.schedule(anatomy)
        for layer, rate in rates.items():
            subject.apply(PrunePrompt(path=anatomy.layers[layer].path, rate=rate))
        subject.notes["mean_keep"] = mean_keep(rates, len(anatomy.layers))
        subject.notes["predicted_prefill_speedup"] = predicted_speedup(anatomy, rates, PROMPT)

    def schedule(self, anatomy: Anatomy) -> dict[int, float]:
        """The rate of each layer that prunes.

        Raises:
            LeanError: a layer that the model does not have, or not one rate or one for each.
        """
        count = len(anatomy.layers)
        layers = spread(count) if self.layers is None else self.layers
        if wrong := [layer for layer in layers if not 0 <= layer < count]:
            raise LeanError(f"the model has {count} layers, and layer {wrong[0]} is not one of them")
        rates = self.rates * len(layers) if len(self.rates) == 1 else self.rates
        if len(rates) != len(layers):
            raise LeanError(f"there are {len(rates)} rates for the layers {list(layers)}: give one, or one per layer")
        return dict(zip(layers, rates, strict=True))

    def refuses(self, anatomy: Anatomy, task: Any) -> str | None:
        if not anatomy.model.can_generate():
            return "it does not generate text, and only prompts of generation are pruned"
        try:
            for layer, rate in self.schedule(anatomy).items():
                PrunePrompt(path=anatomy.layers[layer].path, rate=rate).cost(anatomy)
        except LeanError as error:
            return str(error).rstrip(".")
        return None

    def estimate(self, anatomy: Anatomy, length: int = 128) -> Saving:
        return Saving()  # forward passes are as they were

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return []  # a search measures forward passes, where nothing is generated
