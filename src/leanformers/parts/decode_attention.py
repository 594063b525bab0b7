"""The attention function of decoding: one new token is attended by the stream-K kernel, anything longer by SDPA.

Registered with transformers under a name of its own, with a mask of its own: where there is one query token, the keys
that each sequence sees are nearly always a run of neighbours (left padding before, an unfilled static cache behind, a
sliding window around), so the mask is two numbers per sequence, worked out once per step and shared by all layers. A
mask with holes in it stays SDPA's, and SDPA attends.
"""

from __future__ import annotations

from typing import Any

import torch

from leanformers.errors import LeanError
from leanformers.kernels.decode import decode_attention

DECODE = "lean_attention"

_UNKNOWN = {  # what a model may hand over that the kernel was not built for
    "softcap": "caps its attention scores",
    "position_bias": "adds a bias of positions to its attention scores",
    "s_aux": "has attention sinks",
    "output_attentions": "was asked for attention weights, which are never formed",
}


def attend_decode(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [batch, heads, length, head_dim], key and value with fewer heads -> [batch, length, heads, head_dim].

    attention_mask: what `decode_mask` made: spans int32 [batch, 1, 1, 2], or a mask of SDPA.
    """
    for name, what in _UNKNOWN.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise LeanError(
                f"{type(module).__name__} {what}, which {DECODE!r} does not know: call "
                "model.set_attn_implementation('eager')."
            )
    spanned = attention_mask is not None and attention_mask.dtype == torch.int32
    if query.shape[2] == 1 and (spanned or attention_mask is None):
        if dropout:
            raise LeanError(f"{DECODE!r} has no dropout: call model.eval() before decoding.")
        spans = attention_mask.view(-1, 2) if spanned and attention_mask is not None else None
        if spans is not None or _launches_are_free(query.device):
            return decode_attention(query, key, value, spans, scaling=scaling).transpose(1, 2), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _launches_are_free(device: torch.device) -> bool:
    """Whether a CUDA graph replays what is called now, or a compiled model calls it.

    Else SDPA attends where all sequences see all keys: it takes a CPU less time to launch, which is what such a step
    waits for unless its cache is so long that both are as fast.
    """
    return device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


def decode_mask(*, q_length: int, **kwargs: Any) -> torch.Tensor | None:
    """Transformers' mask interface: SDPA's mask, or the spans of it where there is one query token."""
    from transformers.masking_utils import sdpa_mask

    mask: torch.Tensor | None = sdpa_mask(q_length=q_length, **kwargs)
    if mask is None or q_length != 1 or mask.dtype != torch.bool or mask.shape[1] != 1 or _traced(mask):
        return mask
    spans = spans_of(mask[:, 0, 0])
    return mask if spans is None else spans[:, None, None]


def spans_of(seen: torch.Tensor) -> torch.Tensor | None:
    """The first key that each sequence sees and the end of them, int32 [batch, 2]; None if one sees no plain run.

    seen: bool [batch, length]. Waits for the device, to know whether there are holes.
    """
    place = torch.arange(seen.shape[1], device=seen.device, dtype=torch.int32)
    end = ((place + 1) * seen).amax(1)
    start = torch.where(seen, place, place.new_full((), seen.shape[1])).amin(1).minimum(end)
    holes = (seen.sum(1) != end - start).any()
    return None if bool(holes) else torch.stack([start, end], 1)


def _traced(mask: torch.Tensor) -> bool:
    """Whether the mask has no values to look at now."""
    return torch.compiler.is_compiling() or mask.is_meta or (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def register_decode() -> str:
    """Make the function and its mask known to transformers; returns the name. Safe to call twice."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(DECODE, attend_decode)
    AttentionMaskInterface.register(DECODE, decode_mask)
    return DECODE
