"""The attention function of packed rows: every sequence of the one row attends to itself.

Registered with transformers under a name of its own, for which no mask is ever made: a mask of the packed row would
be as large as the square of all its tokens. The lengths come as the arguments that transformers hands on to
FlashAttention, so no family needs code and a compiled model sees tensors only. Encoders look both ways; under a second
name decoders, which prefill packed prompts, look back.
"""

from __future__ import annotations

from typing import Any

import torch

from leanformers.errors import LeanError
from leanformers.kernels import varlen_attention

PACKED = "packed-leanformers"
PREFILL = "packed-causal-leanformers"


def attend_packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    *,
    causal: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value [1, heads, tokens, head_dim] -> [1, tokens, heads, head_dim]."""
    if cu_seq_lens_q is None or max_length_q is None:
        raise LeanError(
            f"{type(module).__name__} was handed no lengths of the packed sequences: call the model that "
            "leanformers.pack returned, not a part of it."
        )
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [tokens, heads, head_dim]
    return varlen_attention(q, k, v, cu_seq_lens_q, max_length_q, causal=causal, scaling=scaling)[None], None


def attend_prefill(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """The same, looking back."""
    return attend_packed(*args, **{**kwargs, "causal": True})


def register_packed() -> str:
    """Make the function known to transformers; returns its name. Safe to call twice."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, attend_packed)
    return PACKED


def register_prefill() -> str:
    """The same for decoders' prompts."""
    from transformers import AttentionInterface

    AttentionInterface.register(PREFILL, attend_prefill)
    return PREFILL
