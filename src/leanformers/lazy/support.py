"""Which models can drop prompt tokens layer by layer, and which not and why."""

from __future__ import annotations

from leanformers.anatomy import Anatomy


def refusal(anatomy: Anatomy) -> str | None:
    """Why this model cannot, in a few words after its name; None where it can."""
    attentions = [attention for layer in anatomy.layers for attention in layer.attentions()]
    if len(anatomy.stacks) > 1 or any(attention.cross for attention in attentions):
        return "it has an encoder, and only prompts of decoders are pruned"
    if not anatomy.is_text or not all(attention.causal for attention in attentions):
        return "it looks both ways, so no token of it is ever complete; only causal models are pruned"
    if (more := anatomy.more_than_softmax("mixer")) is not None:  # which is handed the mask of the tokens that stay
        return f"it {more}"
    if not anatomy.swappable_attention:
        return "it computes its attention itself"
    return None
