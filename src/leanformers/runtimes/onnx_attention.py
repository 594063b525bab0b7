"""Attention as one operator of ONNX Runtime, in the graphs that it runs.

torch.onnx writes an attention as some twenty nodes (the mask, the heads split and merged, two products, a softmax).
For a short batch their fixed costs exceed the arithmetic. ONNX Runtime's own `MultiHeadAttention` takes queries, keys
and values as the projections leave them, [batch, length, heads * head_dim], and the padding mask, [batch, length]. Its
scores are the same; a padded key gets -10,000 added, whose weight is exactly zero in float32.

transformers' own fusions (`OnnxConfig.ort_fusions`) find an attention by its pattern, and not where the number of heads
is left to a `view(…, -1, head_dim)`, as it is in the encoders of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from leanformers.parts.attention import switch_on

NAME = "leanformers_onnxruntime"


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function, while a graph is traced.

    query, key, value: [batch, heads, length, head_dim]. attention_mask: int32 [batch, key length] or None.
    """
    batch, heads, length, width = query.shape
    flat = [states.transpose(1, 2).reshape(batch, states.shape[2], heads * width) for states in (query, key, value)]
    inputs = flat if attention_mask is None else [*flat, None, attention_mask]
    attended = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        inputs,
        attrs={"num_heads": heads, "scale": width**-0.5 if scaling is None else float(scaling)},
        dtype=query.dtype,
        shape=(batch, length, heads * width),
        version=1,
    )
    return attended.view(batch, length, heads, width), None


def padding_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """The mask that `attend` takes: the caller's own, [batch, length]."""
    return None if attention_mask is None else attention_mask.to(torch.int32)


@contextmanager
def fused_attention(module: Any) -> Iterator[None]:
    """Inside, an encoder's attentions are traced as one operator each; any other model is left as it is."""
    if not fusible(module):
        yield
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, padding_mask)
    before = switch_on(module, NAME)
    try:
        yield
    finally:
        switch_on(module, before)


def fusible(module: Any) -> bool:
    """Whether all that the module attends by is plain softmax over the real tokens of one sequence."""
    from leanformers.anatomy import Anatomy
    from leanformers.errors import LeanError

    if getattr(getattr(module, "config", None), "_attn_implementation", None) != "sdpa":
        return False
    try:
        anatomy = Anatomy.of(module)
    except LeanError:
        return False
    attentions = [attention for layer in anatomy.layers for attention in layer.attentions()]
    return (
        anatomy.swappable_attention
        and anatomy.more_than_softmax() is None
        and not anatomy.reduces_tokens
        and not any(attention.causal or attention.cross for attention in attentions)
    )


@cache
def exporter_class() -> Any:
    """transformers' ONNX exporter, which takes detours out of the graph before it is quantised."""
    from transformers.exporters.auto import get_exporter_class
    from transformers.exporters.utils import quantize_converted_model

    class Exporter(get_exporter_class("onnx")):  # type: ignore[misc]
        def export_program(self, model: Any, sample_inputs: Any, config: Any) -> tuple[Any, Any]:
            program, metadata = super().export_program(model, sample_inputs, replace(config, quantizer=None))
            without_detours(program)
            return quantize_converted_model(program, sample_inputs, config), metadata

    return Exporter


def without_detours(program: Any) -> None:
    """Take out, in place, a reshape that another one undoes: [b, n, h * d] -> [b, n, h, d] -> [b, n, h * d]."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in list(program.graph.all_nodes()):
        inner = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] is not None else None
        if inner is None or inner.op_type != "Reshape":
            continue
        start, end = inner.inputs[0], node.outputs[0]
        if _known(start.shape) and start.shape == end.shape and not end.is_graph_output():
            end.replace_all_uses_with(start)
    RemoveUnusedNodesPass()(program)


def _known(shape: Any) -> bool:
    """Whether every size is a number or has a name; two unnamed sizes may differ."""
    return shape is not None and all(isinstance(size, int) or size.value is not None for size in shape)
