"""A model's weights under GGUF's names, in GGUF's order of rows.

GGUF holds what a linear computes, not its make. A factorised linear is multiplied out, since llama.cpp has
no product of two: it costs what the whole one would. A masked linear keeps its zeros. int8 linears and
embeddings become the floats that their integers stand for; of `int8_dynamic` the rounding of activations is
left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from leanformers.anatomy import Layer, Projection, is_conv1d, is_dense, linear_shape
from leanformers.errors import LeanError
from leanformers.parts.dense_sparse import DenseSparseLinear
from leanformers.parts.linear import LowRankLinear
from leanformers.parts.quantised import Int8Rows
from leanformers.parts.quantised_embedding import QuantisedEmbedding, TiedQuantisedHead, embedding_factor
from leanformers.runtimes.gguf.graph import GONE_WIDTH, Graph


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of the file; `make` computes it in float32 when its turn comes, so that one at a time is held."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


@torch.no_grad()
def matrix(module: Any) -> torch.Tensor:
    """The float32 matrix [out, in] of a linear, or [rows, width] of an embedding; `_readable` says of which."""
    if isinstance(module, LowRankLinear):
        return matrix(module.up) @ matrix(module.down)
    if isinstance(module, Int8Rows):
        return module.dequantise(torch.float32).cpu()
    if isinstance(module, DenseSparseLinear):
        return module.weight.detach().float().cpu()
    weight = module.weight.t() if is_conv1d(module) else module.weight
    return weight.detach().float().cpu()


def _readable(module: Any) -> bool:
    """Whether the module computes no more than the product with its matrix (and the bias)."""
    if isinstance(module, LowRankLinear):
        return _readable(module.up) and _readable(module.down)
    if isinstance(module, Int8Rows | nn.Embedding | DenseSparseLinear):
        return True
    return is_dense(module) and module.weight.is_floating_point() and module.weight.numel() == _size(module)


def _size(module: Any) -> int:
    out_features, in_features = linear_shape(module)
    return out_features * in_features


def interleave(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """From transformers' order of a head's rows to llama.cpp's: [heads * head_dim, ...], weights or biases.

    transformers rotates row i together with row i + head_dim / 2, LLaMA's graph row 2i with row 2i + 1.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def entries(graph: Graph) -> Iterator[Entry]:
    """Every tensor of the file, in its order."""
    anatomy = graph.anatomy
    head, table = anatomy.head, anatomy.embeddings
    shape, scale = (graph.vocab_size, anatomy.hidden_size), _scale(graph)
    yield Entry(name="token_embd.weight", shape=shape, make=lambda: matrix(table) * scale)
    if graph.frequency_factors is not None:
        factors = graph.frequency_factors
        yield Entry(name="rope_freqs.weight", shape=tuple(factors.shape), make=lambda: factors)
    for index, layer in enumerate(anatomy.layers):
        yield from _layer(graph, layer, f"blk.{index}", graph.heads[index])
    yield _vector("output_norm.weight", anatomy.residual.gain(anatomy.final_norms[0]))
    if isinstance(head, TiedQuantisedHead) or anatomy.tied:
        if scale != 1:  # the head has the table as it was
            yield Entry(name="output.weight", shape=shape, make=lambda: matrix(table))
    else:
        yield from _linear("output", Projection("lm_head", head))


def _scale(graph: Graph) -> float:
    """What the table is multiplied by here: Gemma's graph takes the root of the width that it finds, and a sliced model
    that of the width before."""
    if graph.architecture != "gemma3":
        return 1.0
    table: Any = graph.anatomy.embeddings
    factor = table.factor if isinstance(table, QuantisedEmbedding) else embedding_factor(table)
    scale = factor / math.sqrt(graph.anatomy.hidden_size)
    return 1.0 if math.isclose(scale, 1.0, rel_tol=1e-6) else scale


def _layer(graph: Graph, layer: Layer, name: str, heads: int) -> Iterator[Entry]:
    anatomy, attention, feed_forward = graph.anatomy, layer.attention, layer.feed_forward
    names = {
        ("pre", "attention"): "attn_norm",
        ("output", "attention"): "post_attention_norm",
        ("pre", "feed_forward"): "ffn_norm",
        ("output", "feed_forward"): "post_ffw_norm",
    }
    missing = [] if attention.absent and not heads else ["attn_norm"]
    missing.append("ffn_norm")
    for norm in layer.norms:
        if heads or norm.reads != "attention":
            vector = names[norm.place, norm.reads]
            missing = [other for other in missing if other != vector]
            yield _vector(f"{name}.{vector}.weight", anatomy.residual.gain(norm))
    for vector in missing:  # it went with its sub-layer, whose stand-in of zeros does not mind
        yield _vector(f"{name}.{vector}.weight", torch.ones(anatomy.hidden_size))
    if heads and not attention.num_attention_heads:
        for part in ("q", "k", "v"):
            yield _zeros(f"{name}.attn_{part}.weight", (graph.head_dim, anatomy.hidden_size))
        yield _zeros(f"{name}.attn_output.weight", (anatomy.hidden_size, graph.head_dim))
    elif heads:
        turned = graph.head_dim if graph.family.neighbours else None
        yield from _linear(f"{name}.attn_q", attention.query, turned)
        yield from _linear(f"{name}.attn_k", attention.key, turned)
        yield from _linear(f"{name}.attn_v", attention.value)
        yield from _linear(f"{name}.attn_output", attention.output)
        for part, module in (("attn_q_norm", attention.query_norm), ("attn_k_norm", attention.key_norm)):
            if module is not None:
                gain = 1 + module.weight if anatomy.family.norm_offset else module.weight
                yield _vector(f"{name}.{part}.weight", gain)
    for part, projection in feed_forward.projections():
        yield from _linear(f"{name}.ffn_{part}", projection)
    for part in ("gate", "up", "down") if feed_forward.absent else ():
        shape = (GONE_WIDTH, anatomy.hidden_size)
        yield _zeros(f"{name}.ffn_{part}.weight", shape[::-1] if part == "down" else shape)


def _linear(name: str, projection: Projection, head_dim: int | None = None) -> Iterator[Entry]:
    """Weight and bias; with `head_dim` the rows of every head are interleaved.

    Raises:
        LeanError: a linear that computes more than a matrix, such as one with an adapter beside it.
    """
    module = projection.module
    if not _readable(module):
        raise LeanError(
            f"{projection.path} is a {type(module).__name__}, which cannot be written as GGUF: merge adapters into "
            "their linears, and leave other quantising to llama.cpp."
        )

    def order(tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor if projection.rows is None else tensor[projection.rows]
        return rows if head_dim is None else interleave(rows, head_dim)

    shape = (projection.out_features, projection.in_features)
    yield Entry(name=f"{name}.weight", shape=shape, make=lambda: order(matrix(module)))
    bias = getattr(module, "bias", None)
    if bias is not None:
        yield Entry(name=f"{name}.bias", shape=shape[:1], make=lambda: order(bias.detach().float().cpu()))


def _vector(name: str, gain: torch.Tensor) -> Entry:
    return Entry(name=name, shape=tuple(gain.shape), make=lambda: gain.detach().float().cpu())


def _zeros(name: str, shape: tuple[int, ...]) -> Entry:
    return Entry(name=name, shape=shape, make=lambda: torch.zeros(shape))
