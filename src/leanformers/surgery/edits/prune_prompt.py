"""Prune the prompt: after a layer, the tokens that the last one looks at least are left out of the deeper layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from leanformers.anatomy import Anatomy, Layer
from leanformers.errors import LeanError
from leanformers.surgery.edit import Cost, Edit, edit


@edit("prune_prompt")
@dataclass(frozen=True, kw_only=True)
class PrunePrompt(Edit):
    """The layer at ``path`` lets the share ``rate`` in [0, 1) of the tokens that it sees go, while `generate` runs.

    Weights and forward passes without a `LazyCache` are as they were. The model is switched to the attention function
    ``leanformers``, which is SDPA. Source: LazyLLM (arXiv 2407.14057); how it runs is in `leanformers.lazy`.
    """

    path: str
    rate: float

    lost_by_export: ClassVar[str | None] = (
        "An exported decoder reads its prompts whole: only PyTorch's generate leaves tokens out as lazyllm does."
    )

    def _layer(self, anatomy: Anatomy) -> Layer:
        from leanformers.lazy.support import refusal

        name = type(anatomy.model).__name__
        if not 0 <= self.rate < 1:
            raise LeanError(f"{self.path} cannot drop {self.rate} of its tokens: give a rate from 0 to below 1.")
        if (refused := refusal(anatomy)) is not None:
            raise LeanError(f"No layer of {name} can drop tokens of its prompt: {refused}.")
        layer = next((layer for layer in anatomy.layers if layer.path == self.path), None)
        if layer is None:
            raise LeanError(f"No layer at {self.path!r}: the first one of {name} is at {anatomy.layers[0].path!r}.")
        if layer.attention.absent:
            raise LeanError(f"The attention of {self.path!r} was dropped, so nothing there says which tokens matter.")
        return layer

    def apply(self, anatomy: Anatomy, **tensors: object) -> None:
        from leanformers.lazy.pruner import put_pruner

        put_pruner(anatomy, self._layer(anatomy).module, self.rate)

    def cost(self, anatomy: Anatomy) -> Cost:
        self._layer(anatomy)
        return Cost()
