"""One attention function for every family: a module that carries a mixer uses it, any other uses SDPA.

Registered with transformers under the name ``leanformers``. A mixer is a submodule named ``mixer`` of the attention
module that calls; it is handed ::

    mixer(query, key, value, *, padding, causal, scaling, dropout, position_bias, mask)
        -> [batch, length, heads, head_dim]

with query, key, value as [batch, heads, length, head_dim] (keys and values of grouped queries keep their fewer
heads), ``padding`` bool [batch, key length], true where a token is real, or None where nothing is padded, and
``position_bias`` [1 or batch, heads, length, key length] or None, to be added to the scores. ``mask`` is all that
limits the view in one (padding, causality, sliding windows), bool [batch, 1, length, key length], true where a key is
seen; None leaves it to ``causal``. Masks are SDPA's own, so that the fallback is SDPA to the bit; the padding is read
off its last row, which sees every real key (but for sliding windows).

``put_mixer`` and ``switch_on`` are what the edit ``swap_attention`` does.
"""

from __future__ import annotations

from collections.abc import Callable
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
    observe: Callable[[torch.Tensor, torch.Tensor, float], None] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function; shapes as in the module's docstring.

    observe: a caller that hands it to the layer is shown query, key and scaling before anything is attended.
    """
    if observe is not None:
        observe(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    if (tokens := getattr(module, "kept_tokens", None)) is not None:  # fewer than the model's mask speaks of
        attention_mask = tokens.mask(attention_mask)
    mixer = getattr(module, "mixer", None)
    if mixer is None or (getattr(mixer, "reduces_tokens", False) and mixer.idle()):
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
        mask=attention_mask,
    )
    return output, None


def put_mixer(module: nn.Module, mixer: nn.Module) -> None:
    """Let ``mixer`` attend in place of softmax in this attention module, which then refuses to run without it."""
    take_mixer(module)
    module.mixer = mixer
    module.register_forward_pre_hook(_refuse_others)


def take_mixer(module: nn.Module) -> None:
    """Undo ``put_mixer``; nothing where there is no mixer."""
    module._modules.pop("mixer", None)
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _refuse_others:
            del module._forward_pre_hooks[key]


def _refuse_others(module: Any, args: Any) -> None:
    """Another attention function would pass over the mixer in silence."""
    name = module.config._attn_implementation
    if not str(name).endswith(NAME):  # training records what passes under a longer name
        raise LeanError(
            f"The model holds a mixer, but its attention is set to {name!r}: call "
            f"model.set_attn_implementation({NAME!r})."
        )


def switch_on(model: Any, name: str | None = None) -> str:
    """Set the attention function of the model and of all its parts; returns what it was.

    ``name``: by default this one, registered if need be.
    """
    before = str(model.config._attn_implementation)
    name = register() if name is None else name
    model.set_attn_implementation(name)
    for module in model.modules():  # T5's stacks have configs of their own
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_attn_implementation", name) != name:
            config._attn_implementation = name
    return before


def register() -> str:
    """Make the function known to transformers; returns its name. Safe to call twice."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
