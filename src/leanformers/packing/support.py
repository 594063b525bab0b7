"""Which models can be packed, which decoders prefilled without padding, and which not and why."""

from __future__ import annotations

from typing import Any

import torch

from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.kernels.varlen import refusal_of_device

PADDED = "the model itself, padded, stays correct"


def refusal(model: Any) -> str | None:
    """Why a model cannot be packed, in one sentence; None where it can."""
    try:
        anatomy = Anatomy.of(model)
    except LeanError as error:
        return str(error)
    name = type(model).__name__
    if not anatomy.is_text:
        return f"{name} reads no tokens, so its batches have no padding to leave out."
    if len(anatomy.stacks) > 1:
        return f"{name} has an encoder and a decoder, and packing is for encoders alone: {PADDED}."
    if anatomy.causal or getattr(anatomy.config, "is_decoder", False):
        return f"{name} is causal, and packing is for encoders: leanformers.prepack(model) packs its prompts."
    mpnet = anatomy.family.name == "mpnet"  # whose bias packing adds, through attention of its own (`relative`)
    if (more := anatomy.more_than_softmax(*(("position_bias",) if mpnet else ()))) is not None:
        return f"{name} {more}, which packed attention does not know: {PADDED}."
    if not mpnet and not anatomy.swappable_attention:
        return f"{name} computes its attention itself, so packed attention cannot take its place: {PADDED}."
    if getattr(anatomy.config, "chunk_size_feed_forward", 0):
        return f"{name} cuts its feed-forward into chunks: set chunk_size_feed_forward to 0 to pack it."
    return None


def refusal_here(anatomy: Anatomy, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model cannot run packed on this device in this dtype; None where it can."""
    if device.type == "cpu":
        return None
    sizes = sorted({a.head_dim for layer in anatomy.layers for a in layer.attentions()})
    for head_dim in sizes:
        refused = [refusal_of_device(backend, device, dtype, head_dim) for backend in ("triton", "torch")]
        if all(refused):
            reason = str(refused[0]).split(":")[0]
            return f"Packed attention has no kernel here ({reason}), and without one it would be slow: {PADDED}."
    return None


def refusal_to_prefill(model: Any) -> str | None:
    """Why a decoder's prompts cannot be packed, in one sentence; None where they can."""
    try:
        anatomy = Anatomy.of(model)
    except LeanError as error:
        return str(error)
    name = type(model).__name__
    if not anatomy.is_text or len(anatomy.stacks) > 1 or anatomy.config.is_encoder_decoder:
        return f"{name} is no decoder alone, and prompts are packed for decoders: {PADDED}."
    if not anatomy.causal:
        return f"{name} is not causal and has no prompts to prefill: leanformers.pack(model) runs it without padding."
    attentions = [attention for layer in anatomy.layers for attention in layer.attentions()]
    if any(attention.cross for attention in attentions):
        return f"{name} attends to an encoder, which packed prompts do not: {PADDED}."
    lazy = any(getattr(layer.module, "pruner", None) is not None for layer in anatomy.layers)
    if lazy or any(getattr(attention.module, "kept_tokens", None) is not None for attention in attentions):
        return f"{name} drops tokens as it reads, and packed prompts keep theirs: {PADDED}."
    if (more := anatomy.more_than_softmax("window")) is not None:  # windows count by the prompts' lengths
        return f"{name} {more}, which packed attention does not know: {PADDED}."
    if getattr(anatomy.config, "use_bidirectional_attention", False):
        return f"{name} looks both ways in its prompts, which packed prompts do not: {PADDED}."
    if not anatomy.swappable_attention:
        return f"{name} computes its attention itself, so packed attention cannot take its place: {PADDED}."
    return None


def refusal_of_length(anatomy: Anatomy, longest: int) -> str | None:
    """Why prompts of this length cannot be packed for a decoder; None where they can."""
    config, name = anatomy.config, type(anatomy.model).__name__
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and longest > most:
        return f"The longest prompt has {longest} tokens, and {name} takes {most}: cut it."
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    if window is not None and slides and longest > window:
        return (
            f"{name} looks back {window} tokens and the longest prompt has {longest}, and packed attention has no "
            f"window: {PADDED}."
        )
    if positions_by_the_longest(config):
        plain = config.rope_parameters.get("original_max_position_embeddings") or most
        if plain is not None and longest > plain:
            return (
                f"{name} turns its positions by the longest prompt of a batch beyond {plain} tokens, and one here has "
                f"{longest}: {PADDED}."
            )
    return None


def positions_by_the_longest(config: Any) -> bool:
    """Whether rotations depend on the longest prompt, which the model looks at in each pass."""
    rope = getattr(config, "rope_parameters", None)
    return isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope")
