"""What stands where a sub-layer was dropped: modules without weights whose answer is zero.

A family's layer goes on calling its attention and its feed-forward, and adds nothing. Zeros are made from the shape
of the input alone, so that an exported graph drops all that led to them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from leanformers.parts.dense import adopt


class AbsentLinear(nn.Module):
    """A linear without weights: `[..., in] -> zeros [..., out]`.

    It reads the residual stream and has no outputs, or has no inputs and writes the stream (``writes``).
    """

    bias = None

    def __init__(self, hidden_size: int, *, writes: bool) -> None:
        super().__init__()
        self.hidden_size, self.writes = hidden_size, writes  # surgery finds the stream's width by this name

    @property
    def in_features(self) -> int:
        return 0 if self.writes else self.hidden_size

    @property
    def out_features(self) -> int:
        return self.hidden_size if self.writes else 0

    @property
    def weight(self) -> torch.Tensor:
        """The empty matrix [out, in], for code that looks at a weight: T5 would cast to any dtype but int8, and
        transformers draw it anew were it not marked."""
        nothing: Any = torch.empty(self.out_features, self.in_features, dtype=torch.int8)
        nothing._is_hf_initialized = True
        return nothing

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class AbsentAttention(nn.Module):
    """Answers as an attention module does, `(zeros [batch, length, hidden_size], None)`.

    The key/value cache reads its length off the first layer, so a self-attention that is gone still enters one
    zero per token.

    Args:
        hidden_size: width of the answer.
        projects: whether the output projection is a part of it; else the answer has no features.
        head_dim: of the heads that were there; kept for the anatomy.
        layer_idx: place in the key/value cache, None where nothing is cached.
        is_causal: as it was.
        hands_on_bias: whether the answer has the position bias as its second part (T5); it is handed on unread.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        *,
        projects: bool,
        layer_idx: int | None,
        is_causal: bool,
        hands_on_bias: bool,
    ) -> None:
        super().__init__()
        self.hidden_size, self.head_dim, self.projects = hidden_size, head_dim, projects
        self.layer_idx, self.is_causal, self.hands_on_bias = layer_idx, is_causal, hands_on_bias

    @classmethod
    def like(cls, old: Any) -> AbsentAttention:
        """A part in place of `old`, an attention of the anatomy."""
        part = cls(
            old.output.out_features,
            old.head_dim,
            projects=old.output.path.startswith(f"{old.path}."),
            layer_idx=None if old.cross else getattr(old.module, "layer_idx", None),
            is_causal=old.causal,
            hands_on_bias=hasattr(old.module, "has_relative_attention_bias"),
        )
        adopt(part, old.module)
        return part

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None and self.layer_idx is not None:
            cache = getattr(cache, "self_attention_cache", cache)
            entry = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(entry, entry, self.layer_idx)
        zeros = hidden_states.new_zeros(*hidden_states.shape[:-1], self.hidden_size if self.projects else 0)
        return (zeros, kwargs.get("position_bias"), None) if self.hands_on_bias else (zeros, None)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}"
