"""Attention over packed sequences of different lengths: no padding, nothing computed between sequences.

Sequences lie end to end on one axis, sequence b in rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. Three backends
answer alike (Zhai et al., 2023, arXiv 2210.03052, section on fused attention; online softmax instead of its two
passes):

- ``reference``: plain PyTorch, scaled dot-product attention sequence by sequence. Any device, dtype and gradient.
- ``triton``: our kernel (`varlen_triton.py`), on a GPU, or on a CPU under ``TRITON_INTERPRET=1``. No gradients.
- ``torch``: ``torch.nn.attention.varlen.varlen_attn``, FlashAttention 2, on a GPU in half precision, no bias.

``backend=None`` takes the one that was measured to be the fastest, of those that can do it (`choose`).
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from leanformers.errors import LeanError

if TYPE_CHECKING:
    from leanformers.kernels.varlen_triton import Tiles

BACKENDS = ("reference", "triton", "torch")
# On a GPU. In a sweep on an H100 (torch 2.11, Triton 3.6, bfloat16; heads of 32, 64, 80 and 128, lengths uniform on
# [0.2 S, S], S 128 to 2,048, batches of 16 and 64, causal or not) ours was the faster in every one of 52 cases, by the
# least at heads of 80; evidence/bytetransformer_gpu.py times both again.
FASTEST = ("triton", "torch")
HEAD_DIMS = (16, 128)  # least and most of the kernel
_HALF = (torch.float16, torch.bfloat16)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
    *,
    causal: bool = False,
    scaling: float | None = None,
    bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Softmax attention of each sequence to itself.

    Args:
        query: [tokens, heads, head_dim]; any strides whose last one is 1, such as a view of a fused projection.
        key, value: [tokens, key heads, head_dim]; the query heads are a multiple of the key heads.
        cu_seqlens: int32 [sequences + 1] on the same device, rising from 0; equal neighbours are an empty sequence.
            Rows from its last entry on belong to no sequence, and what the output holds there is undefined.
        max_length: no sequence is longer.
        causal: a token sees itself and what stands before it in its sequence.
        scaling: of the scores; head_dim ** -0.5 by default.
        bias: [heads, at least max_length, at least max_length], added to the scores at the places inside a sequence.
        backend: one of `BACKENDS`; by default the one that was measured to be the fastest.

    Returns:
        [tokens, heads, head_dim], contiguous.

    Raises:
        LeanError: a backend that cannot do this here, or gradients through the Triton kernel.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if backend is None:
        backend = choose(query, key, bias=bias)
    elif (refused := refusal(backend, query, key, value, bias)) is not None:
        raise LeanError(refused)
    if query.shape[0] == 0 or max_length == 0:
        return torch.zeros_like(query, memory_format=_PLAIN)
    if backend == "triton":
        from leanformers.kernels.varlen_triton import launch

        tiles = tiles_for(query.shape[-1], max_length, query.dtype)
        cut: dict[str, Any] = {"causal": causal, "scaling": scaling, "bias": bias, "tiles": tiles}
        if torch.compiler.is_compiling():  # which minds the device itself
            return launch(query, key, value, cu_seqlens, max_length, **cut)
        with torch.cuda.device_of(query):
            return launch(query, key, value, cu_seqlens, max_length, **cut)
    if backend == "torch":
        from torch.nn.attention.varlen import varlen_attn

        grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
        out: Any = varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, max_length, max_length,
            scale=scaling, window_size=(-1, 0 if causal else -1), **grouped,
        )  # fmt: skip
        return out
    if torch.compiler.is_compiling():
        return _reference_op(query, key, value, cu_seqlens, causal, scaling, bias)
    return reference(query, key, value, cu_seqlens, causal=causal, scaling=scaling, bias=bias)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    causal: bool = False,
    scaling: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain PyTorch: one call of scaled dot-product attention per sequence."""
    edges = cu_seqlens.tolist()
    grouped = query.shape[1] != key.shape[1]
    out = query.new_zeros(query.shape) if edges[-1] < len(query) else torch.empty_like(query, memory_format=_PLAIN)
    whole: list[torch.Tensor] = []
    for low, high in pairwise(edges):
        if low == high:
            continue
        q, k, v = (part[low:high].transpose(0, 1)[None] for part in (query, key, value))  # [1, heads, length, head_dim]
        mask = None
        if bias is not None:
            length = high - low
            mask = bias[None, :, :length, :length].to(query.dtype)
            if causal:
                mask = mask.masked_fill(_later(length, mask.device), float("-inf"))
        attended = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scaling, enable_gqa=grouped
        )
        whole.append(attended[0].transpose(0, 1))
        if not query.requires_grad:
            out[low:high] = whole.pop()
    if whole:  # gradients flow through a concatenation, not through writes
        left = query.new_zeros(len(query) - edges[-1], *query.shape[1:])
        return torch.cat([*whole, left])
    return out


_PLAIN = torch.contiguous_format


def _later(length: int, device: torch.device) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


@torch.library.custom_op("leanformers::varlen_attention_reference", mutates_args=())
def _reference_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    causal: bool,
    scaling: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The reference as one operation, so that its loop over lengths breaks no graph."""
    return reference(query, key, value, cu_seqlens, causal=causal, scaling=scaling, bias=bias)


@_reference_op.register_fake
def _(query, key, value, cu_seqlens, causal, scaling, bias):  # type: ignore[no-untyped-def]
    return torch.empty_like(query, memory_format=_PLAIN)


# -- which backend -------------------------------------------------------------------------------------------


def refusal(
    backend: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None
) -> str | None:
    """Why a backend cannot do this here, in one sentence with the remedy; None where it can."""
    if backend not in BACKENDS:
        return f"there is no backend {backend!r} of variable-length attention; choose one of {', '.join(BACKENDS)}."
    if backend == "reference":
        return None
    if (refused := refusal_of_device(backend, query.device, query.dtype, query.shape[-1])) is not None:
        return refused
    if backend == "torch":
        no_bias = "varlen_attn adds no bias to the scores: use the backend 'triton' or 'reference'."
        return None if bias is None else no_bias
    if torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value)):
        return (
            "The Triton kernel of variable-length attention has no gradients: call it under torch.no_grad(), or use "
            "the backend 'reference'."
        )
    return None


@lru_cache(maxsize=256)
def refusal_of_device(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The same for tensors of these properties."""
    if backend == "reference":
        return None
    if backend == "triton" and not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        low, high = HEAD_DIMS
        return f"The Triton kernel takes heads of {low} to {high} numbers, not {head_dim}: use the backend 'reference'."
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton, or use the backend 'reference'."
    if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"The backend {backend!r} runs on a GPU, not on {device.type!r}: use the backend 'reference'."
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is too old for {backend!r}, which needs Ampere or later."
    if backend == "torch":
        if dtype not in _HALF:
            return f"varlen_attn takes float16 or bfloat16, not {dtype}: use the backend 'triton'."
        if importlib.util.find_spec("torch.nn.attention.varlen") is None:
            return "torch.nn.attention.varlen came with torch 2.10: update torch, or use the backend 'triton'."
        if head_dim % 8:
            return f"varlen_attn takes heads of a multiple of 8 numbers, not {head_dim}: use the backend 'triton'."
    elif dtype not in (*_HALF, torch.float32):
        return f"The Triton kernel takes float16, bfloat16 or float32, not {dtype}."
    return None


def choose(query: torch.Tensor, key: torch.Tensor, *, bias: torch.Tensor | None = None) -> str:
    """The backend that was measured to be the fastest for this, among those that can do it."""
    if query.device.type != "cuda":
        return "reference"
    needs_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    for backend in FASTEST:
        if (needs_gradient and backend == "triton") or (bias is not None and backend == "torch"):
            continue
        if _runs(backend, query.device, query.dtype, query.shape[-1]):
            return backend
    return "reference"


@torch.compiler.assume_constant_result
def _runs(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Asked at every call, and no business of a graph that is being compiled."""
    return refusal_of_device(backend, device, dtype, head_dim) is None


def tiles_for(head_dim: int, max_length: int, dtype: torch.dtype) -> Tiles:
    """How the kernel's launch is cut, as measured on an H100."""
    from leanformers.kernels.varlen_triton import Tiles

    if dtype == torch.float32:
        return Tiles(64 if head_dim <= 64 else 32, 32, 4, 2)
    if max_length <= 768:
        return Tiles(64, 32, 4, 3) if head_dim > 32 else Tiles(64, 64, 4, 3)
    return Tiles(128, 64, 8, 3) if 32 < head_dim <= 64 else Tiles(64, 64, 4, 3)
