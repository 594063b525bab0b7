"""Caches that take the keys and values of packed rows, and give them to an ordinary cache prompt by prompt."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from leanformers.packing.prompts import Rows


class Unpacker(Cache):
    """Writes each layer's keys and values where they belong the moment that they are computed.

    So the packed cache never exists: beside the result there are the states of one layer. Places that no token is
    written to, which are the left padding, stay zero.
    """

    def __init__(self, prompts: int, width: int) -> None:
        super().__init__(layers=[])
        self.prompts, self.width = prompts, width
        self.rows: Rows | None = None  # those that are being computed
        self._kept: dict[int, list[torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take [rows, key heads, size, head_dim] and hand them on to attention as they are."""
        assert self.rows is not None
        if layer_idx not in self._kept:
            shapes = [(self.prompts * self.width, s.shape[1], s.shape[3]) for s in (key_states, value_states)]
            self._kept[layer_idx] = [key_states.new_zeros(shape) for shape in shapes]
        for kept, states in zip(self._kept[layer_idx], (key_states, value_states), strict=True):
            flat = states.transpose(1, 2).flatten(0, 1)  # [rows * size, key heads, head_dim]
            if self.rows.filled is not None:
                flat = flat.index_select(0, self.rows.filled.to(flat.device))
            target = self.rows.target.to(flat.device)
            kept.index_copy_(0, target, flat[: len(target)])  # a graph's row may be longer
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def finish(self, config: Any) -> DynamicCache:
        """An ordinary cache [prompts, key heads, width, head_dim] of what was written, without a copy."""
        cache = DynamicCache(config=config)
        for layer_idx in sorted(self._kept):
            keys, values = (
                kept.unflatten(0, (self.prompts, self.width)).transpose(1, 2) for kept in self._kept.pop(layer_idx)
            )
            layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
            if type(layer) is DynamicLayer:
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
            else:  # one with a window drops what it no longer needs
                cache.update(keys, values, layer_idx)
        return cache


class Collector(Cache):
    """Holds every layer's states of the packed rows, for a forward pass that is compiled or replayed."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kept: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.kept.append((layer_idx, key_states, value_states))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0
