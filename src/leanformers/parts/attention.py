"""One attention function for every family: a module that carries a mixer uses it, any other uses SDPA.

Registered with transformers under the name ``leanformers``. A mixer is a submodule named ``mixer`` of the attention
module that calls; it is handed ::

    mixer(query, key, value, *, padding, causal, scaling, dropout, position_bias) -> [batch, length, heads, head_dim]

with query, key, value as [batch, heads, length, head_dim] (keys and values of grouped queries keep their fewer
heads), ``padding`` bool [batch, key length], true where a token is real, or None where nothing is padded, and
``position_bias`` [1 or batch, heads, length, key length] or None, to be added to the scores. Masks are SDPA's own, so
that the fallback is SDPA to the bit; the padding is read off its last row, which sees every real key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from leanformers.errors import LeanError

NAME = "leanformers"


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function; shapes as in the module's docstring."""
    mixer = getattr(module, "mixer", None)
    if mixer is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if position_bias is not None:
            kwargs["position_bias"] = position_bias
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise LeanError("A mixer needs a padding mask, but the model was given an additive one of its own.")
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    output = mixer(
        query,
        key,
        value,
        padding=None if attention_mask is None else attention_mask[:, 0, -1],
        causal=causal,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        position_bias=position_bias,
    )
    return output, None


def register() -> str:
    """Make the function known to transformers; returns its name. Safe to call twice."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
