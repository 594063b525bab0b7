"""Which models can be packed, and which not and why."""

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
        return f"{name} is causal, and packing is for encoders: {PADDED}."
    if any(attention.positions for layer in anatomy.layers for attention in layer.attentions()):
        return f"{name} scores positions within its attention, which packed attention does not: {PADDED}."
    mixer = next((a.path for layer in anatomy.layers for a in layer.attentions() if a.mixer is not None), None)
    if mixer is not None:
        return f"The attention at {mixer!r} holds a mixer, which takes no packed sequences: {PADDED}."
    if anatomy.family.shared_position_bias and anatomy.family.name != "mpnet":
        return f"{name} adds relative positions to its scores, which packing knows of MPNet only: {PADDED}."
    if anatomy.family.name != "mpnet" and not model._can_set_attn_implementation():
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
