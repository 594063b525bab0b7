"""Swap attention: another rule of which positions mix, in place of softmax attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from leanformers.anatomy import Anatomy, count_parameters
from leanformers.errors import LeanError
from leanformers.parts.attention import put_mixer, switch_on
from leanformers.parts.top_k import TopK
from leanformers.surgery.edit import Cost, Edit, edit

MIXERS: dict[str, Any] = {"top_k": TopK}
"""The mixers by name: classes with `like(attention, **settings)`."""


@edit("swap_attention")
@dataclass(frozen=True, kw_only=True)
class SwapAttention(Edit):
    """Put a mixer into the attention at ``path``: ``top_k`` with ``{"k": 30}``.

    ``settings`` are the mixer's own, plain JSON. The projections stay. The whole model is switched to the attention
    function ``leanformers``, which is SDPA wherever there is no mixer.
    """

    path: str
    mixer: str
    settings: dict[str, Any] = field(default_factory=dict)

    def _mixer(self, anatomy: Anatomy) -> nn.Module:
        attention = anatomy.attention(self.path)
        if self.mixer not in MIXERS:
            raise LeanError(f"There is no mixer {self.mixer!r} for {self.path}: choose one of {', '.join(MIXERS)}.")
        if getattr(attention.mixer, "reduces_tokens", False):
            raise LeanError(f"The attention at {self.path} chooses tokens to drop: swap it before reduce_tokens.")
        if (more := anatomy.more_than_softmax("position_bias", "window", "mixer")) is not None:
            raise LeanError(f"{type(anatomy.model).__name__} {more}, which no mixer does: leave {self.path} as it is.")
        if not anatomy.swappable_attention:
            raise LeanError(
                f"{type(anatomy.model).__name__} does not hand its attention to transformers' attention interface, "
                f"so no mixer can take its place at {self.path}."
            )
        try:
            part: nn.Module = MIXERS[self.mixer].like(attention, **self.settings)
        except TypeError as error:
            raise LeanError(
                f"The mixer {self.mixer!r} at {self.path} does not take {self.settings}: {error}."
            ) from None
        return part.train(attention.module.training)

    def apply(self, anatomy: Anatomy, **tensors: object) -> None:
        mixer = self._mixer(anatomy)
        put_mixer(anatomy.attention(self.path).module, mixer)
        switch_on(anatomy.model)

    def cost(self, anatomy: Anatomy) -> Cost:
        old = anatomy.attention(self.path).mixer
        new = count_parameters(self._mixer(anatomy))
        return Cost(parameters=new - (count_parameters(old) if old is not None else 0))
