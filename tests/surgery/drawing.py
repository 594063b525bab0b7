"""Edits that fit a model, drawn from a random generator: what the surgery tests are parametrised over."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch

from leanformers.anatomy import Anatomy, linear_shape
from leanformers.errors import LeanError
from leanformers.surgery import (
    DropLayers,
    DropSublayers,
    Edit,
    FactoriseLinear,
    KeepHeads,
    KeepNeurons,
    KeepVocabulary,
    MaskWeights,
    PrunePrompt,
    QuantiseEmbeddings,
    QuantiseLinear,
    ReduceTokens,
    SliceResidual,
    SwapAttention,
)

Draw = tuple[Edit, dict[str, Any]]
KINDS = (
    "drop_layers",
    "drop_sublayers",
    "swap_attention",
    "keep_heads",
    "keep_neurons",
    "keep_vocabulary",
    "factorise_linear",
    "factorise_linear_dense_sparse",
    "mask_weights",
    "mask_weights_2_4",
    "quantise_linear",
    "quantise_linear_dynamic",
    "quantise_embeddings",
    "slice_residual",
    "prune_prompt",
    "reduce_tokens",
)
SPECIAL = 16  # ids below it stay: the tests' inputs and the configs' special tokens


def draw(model: Any, kind: str, seed: int = 0) -> Draw | None:
    """An edit of a kind with its tensors, or None where the family has no place for it."""
    dice, anatomy = random.Random(seed), Anatomy.of(model)
    layer = dice.choice(anatomy.layers)
    if kind == "drop_layers":
        stack = dice.choice(sorted(anatomy.stacks))
        count = len(anatomy.stacks[stack])
        keep = sorted(dice.sample(range(count), max(1, count - 1)))
        return DropLayers(stack=stack, keep=tuple(keep)), {}
    there = layer.sublayers()
    if kind == "drop_sublayers":
        return (DropSublayers(path=layer.path, sublayers=(dice.choice(list(there)),)), {}) if there else None
    attentions = list(layer.attentions())
    if kind == "swap_attention":
        if not attentions or not model._can_set_attn_implementation():
            return None
        return SwapAttention(path=dice.choice(attentions).path, mixer="top_k", settings={"k": 3}), {}
    if kind == "keep_heads":
        if anatomy.family.shared_position_bias or not attentions:
            return None
        attention = dice.choice(attentions)
        total = attention.num_key_value_heads
        keep = sorted(dice.sample(range(total), max(1, total // 2)))
        return KeepHeads(path=attention.path, size=len(keep)), {"keep": torch.tensor(keep)}
    if kind == "keep_neurons":
        part = layer.feed_forward
        if part.absent:
            return None
        keep = sorted(dice.sample(range(part.intermediate_size), max(1, part.intermediate_size // 2)))
        return KeepNeurons(path=part.path, size=len(keep)), {"keep": torch.tensor(keep)}
    if kind == "keep_vocabulary":
        if not anatomy.is_text:
            return None
        total = anatomy.embeddings.weight.shape[0]
        keep = [*range(SPECIAL), *sorted(dice.sample(range(SPECIAL, total), (total - SPECIAL) // 2))]
        return KeepVocabulary(size=len(keep)), {"keep": torch.tensor(keep)}
    if kind == "quantise_embeddings":
        return (QuantiseEmbeddings(), {}) if anatomy.is_text else None
    if kind == "slice_residual":
        total, size = anatomy.hidden_size, anatomy.hidden_size * 3 // 4
        try:
            SliceResidual(size=size).cost(anatomy)
        except LeanError:
            return None
        return SliceResidual(size=size), {"keep": torch.tensor(sorted(dice.sample(range(total), size)))}
    if kind == "reduce_tokens":
        free = [one.index for one in anatomy.layers if not one.attention.absent and one.attention.mixer is None]
        layers = sorted(dice.sample(free, min(2, len(free))))
        where = dice.choice(("after_layer", "before_feed_forward"))
        settings = {"keep": [0.6] * len(layers), "drop": [1] * len(layers), "votes": [3] * len(layers)}
        reduced = ReduceTokens(layers=tuple(layers), where=where, rule="page_rank", settings=settings)
        try:
            reduced.cost(anatomy)
        except LeanError:
            return None
        return reduced, {}
    if kind == "prune_prompt":
        pruned = PrunePrompt(path=layer.path, rate=dice.choice((0.3, 0.6)))
        try:
            pruned.cost(anatomy)
        except LeanError:
            return None
        return pruned, {}
    paths = sorted(p for p in anatomy.roles if p.startswith(layer.path + "."))
    if not paths:
        return None
    path = dice.choice(paths)
    out_features, in_features = linear_shape(anatomy.module(path))
    if kind == "factorise_linear":
        return FactoriseLinear(path=path, rank=dice.randint(2, min(out_features, in_features) // 2)), {}
    if kind == "factorise_linear_dense_sparse":
        width = next(size for size in (8, 4, 2, 1) if in_features % size == 0)
        mode = dice.choice(("materialised", "factored"))
        return FactoriseLinear(path=path, kind="dense_sparse", rank=5, width=width, nonzeros=2, mode=mode), {}
    if kind == "mask_weights":
        mask = torch.rand(out_features, in_features, generator=torch.Generator().manual_seed(seed)) > 0.4
        return MaskWeights(path=path), {"mask": mask}
    if kind == "mask_weights_2_4":
        if in_features % 4:
            return None
        scores = torch.rand(out_features, in_features // 4, 4, generator=torch.Generator().manual_seed(seed))
        mask = torch.zeros_like(scores).scatter(2, scores.topk(2).indices, 1).bool().view(out_features, in_features)
        return MaskWeights(path=path, pattern="2:4"), {"mask": mask}
    scheme = "int8_dynamic" if kind == "quantise_linear_dynamic" else "int8_weight_only"
    return QuantiseLinear(path=path, scheme=scheme), {}


def sequence(model: Any, seed: int, length: int) -> Iterator[str]:
    """Kinds for a random sequence of edits, in any order."""
    yield from random.Random(seed).choices(KINDS, k=length)
