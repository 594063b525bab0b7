"""Packing for MPNet, whose attention adds one bias of relative positions to the scores of every layer.

The bias depends on the distance of two tokens only, so within a sequence it is what it was; it is made once per
forward pass for the longest sequence, never for the packed row. MPNet hands neither arguments nor attention functions
on, so on the packed copy two methods stand in for its own. Lengths travel in the place of the mask, as a tensor
[1, 1, longest, sequences + 1] whose every row is `cu_seqlens`: so nothing is kept between calls, and a compiled model
sees its sizes.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from leanformers.anatomy import Anatomy
from leanformers.kernels import varlen_attention

_BUCKETS = 32  # whatever the config says: MPNet passes on no other number


def lengths_as_mask(cu_seqlens: torch.Tensor, max_length: int) -> torch.Tensor:
    """[1, 1, max_length, sequences + 1], a view."""
    return cu_seqlens.expand(1, 1, max_length, -1)


def put_packed_attention(anatomy: Anatomy) -> None:
    """Let MPNet's encoder and its attentions read packed rows, and nothing else any more."""
    encoder: Any = anatomy.module("encoder")
    encoder.forward = MethodType(_encode, encoder)
    for layer in anatomy.layers:
        if not layer.attention.absent:
            layer.attention.module.forward = MethodType(_attend, layer.attention.module)


def _encode(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    output_attentions: bool = False,
    output_hidden_states: bool = False,
    return_dict: bool = False,
    **kwargs: Any,
) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    # As MPNet computes it, but on its own device from the start: a CUDA graph takes nothing from elsewhere.
    places = torch.arange(attention_mask.shape[2], device=hidden_states.device)
    buckets = self.relative_position_bucket(places[None] - places[:, None], num_buckets=_BUCKETS)
    bias = self.relative_attention_bias(buckets).permute(2, 0, 1).contiguous()  # [heads, max_length, max_length]
    seen = [hidden_states]
    for layer in self.layer:
        seen.append(layer(seen[-1], attention_mask, bias)[0])
    return BaseModelOutput(last_hidden_state=seen[-1], hidden_states=tuple(seen) if output_hidden_states else None)


def _attend(
    self: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor, position_bias: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor]:
    """[1, tokens, hidden_size] -> the same."""
    split = (-1, self.attention_head_size)
    states = hidden_states[0]
    q, k, v = (project(states).unflatten(-1, split) for project in (self.q, self.k, self.v))
    mixed = varlen_attention(q, k, v, attention_mask[0, 0, 0], attention_mask.shape[2], bias=position_bias)
    return (self.o(mixed.flatten(1))[None],)
