"""Which models can drop prompt tokens layer by layer, and which not and why."""

from __future__ import annotations

from typing import Any

from leanformers.anatomy import Anatomy


def refusal(anatomy: Anatomy) -> str | None:
    """Why this model cannot, in a few words after its name; None where it can."""
    config: Any = anatomy.config
    attentions = [attention for layer in anatomy.layers for attention in layer.attentions()]
    if len(anatomy.stacks) > 1 or any(attention.cross for attention in attentions):
        return "it has an encoder, and only prompts of decoders are pruned"
    if not anatomy.is_text or not all(attention.causal for attention in attentions):
        return "it looks both ways, so no token of it is ever complete; only causal models are pruned"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(config, "sliding_window", None) is not None:
        what = ", ".join(sorted(kinds)) or "sliding windows"
        return f"it has layers that do not see all earlier tokens ({what})"
    if any(attention.positions for attention in attentions) or anatomy.family.shared_position_bias:
        return "it adds a bias of positions to its attention scores, which needs the full grid"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps its attention scores"
    if any(getattr(attention.module, "sinks", None) is not None for attention in attentions):
        return "it has attention sinks of its own"
    if not anatomy.model._can_set_attn_implementation():
        return "it computes its attention itself"
    return None
