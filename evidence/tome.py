"""ToMe, an outside reference for token reduction: tokens are merged where Zero-TPrune drops them.

Source: Bolya et al. (2023), Token Merging, arXiv 2210.09461. Tokens are split into alternating halves; those of the one
that are most like one of the other, by the mean key of the heads, become the mean of both, weighted by how many patches
each stands for; the logarithm of that number is added to later attention scores.
Deviations: tokens are merged after a layer, not inside of it, since the counts compared with are those after layers;
more than half of the tokens go in several rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from leanformers.anatomy import Anatomy


def merged(model: Any, pixels: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """Logits of a `ViTForImageClassification` whose layer l leaves sizes[l] tokens."""
    anatomy = Anatomy.of(model)
    base: Any = anatomy.base
    states = base.embeddings(pixels)
    weight = states.new_ones(*states.shape[:2], 1)
    for layer in anatomy.layers:
        normed = layer.module.layernorm_before(states)
        attention = layer.attention
        shape = (*normed.shape[:2], attention.num_attention_heads, attention.head_dim)
        query, key, value = (
            part.module(normed).view(shape).transpose(1, 2)
            for part in (attention.query, attention.key, attention.value)
        )
        bias = weight.log().transpose(1, 2)[:, None]  # [batch, 1, 1, length]
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        states = states + attention.output.module(mixed.transpose(1, 2).flatten(2))
        states = states + layer.module.mlp(layer.module.layernorm_after(states))
        metric = key.mean(1)
        while layer.index in sizes and states.shape[1] > sizes[layer.index]:
            states, weight, metric = _merge(states, weight, metric, states.shape[1] - sizes[layer.index])
    logits: Tensor = model.classifier(base.layernorm(states)[:, 0])
    return logits


def _merge(states: Tensor, weight: Tensor, metric: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    metric = functional.normalize(metric, dim=-1)
    even, odd = metric[:, ::2], metric[:, 1::2]
    alike = even @ odd.transpose(1, 2)
    alike[:, 0] = -torch.inf  # the class token is of the first half and stays
    best, target = alike.max(-1)
    count = min(count, even.shape[1] - 1)
    order = best.argsort(dim=-1, descending=True)
    gone, stays = order[:, :count], order[:, count:].sort(-1).values
    target = target.gather(1, gone)

    def joined(what: Tensor) -> Tensor:
        width = what.shape[-1]
        first, second = what[:, ::2], what[:, 1::2]
        kept = first.gather(1, stays[..., None].expand(-1, -1, width))
        moved = first.gather(1, gone[..., None].expand(-1, -1, width))
        return torch.cat([kept, second.scatter_add(1, target[..., None].expand(-1, -1, width), moved)], dim=1)

    weights = joined(weight)
    return joined(states * weight) / weights, weights, joined(metric * weight) / weights
