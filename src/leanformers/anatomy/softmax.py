"""What makes an attention more than softmax(query key) value: one answer for all that attends in its place.

Kernels, packing, mixers and token scores compute plain attention, each with the few extras that it knows. Whoever puts
one of them into a model asks here which other extras that model has, since they would be passed over in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from leanformers.anatomy.parts import Attention, Layer

if TYPE_CHECKING:
    from leanformers.anatomy.anatomy import Anatomy

Extra = Literal["position_bias", "capped_scores", "sinks", "window", "mixer"]


def extras(anatomy: Anatomy) -> Iterator[tuple[Extra, str]]:
    """What the model's attentions compute beside plain attention, each in words that follow the model's name."""
    if anatomy.family.shared_position_bias:
        yield "position_bias", "adds a bias of positions to its attention scores"
    if getattr(anatomy.config, "attn_logit_softcapping", None) is not None:
        yield "capped_scores", "caps its attention scores"
    for layer in anatomy.layers:
        for attention in layer.attentions():
            yield from _own(anatomy.config, layer, attention)


def _own(config: Any, layer: Layer, attention: Attention) -> Iterator[tuple[Extra, str]]:
    if attention.positions:
        yield "position_bias", "scores positions within its attention"
    if getattr(attention.module, "sinks", None) is not None:
        yield "sinks", "has attention sinks"
    if not attention.cross and (view := _limited_view(config, layer.index)) is not None:
        yield "window", f"has layers that do not see all earlier tokens ({view})"
    if attention.mixer is not None:
        yield "mixer", f"holds a mixer at {attention.path!r}"


def _limited_view(config: Any, index: int) -> str | None:
    kinds = getattr(config, "layer_types", None)
    if kinds:  # then the window is that of the layers that name it
        return None if kinds[index] == "full_attention" else str(kinds[index])
    return None if getattr(config, "sliding_window", None) is None else "sliding windows"
