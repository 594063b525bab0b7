"""Kernels, each beside its plain PyTorch reference; Triton is imported only where a kernel runs."""

from leanformers.kernels.decode import decode_attention
from leanformers.kernels.varlen import varlen_attention

__all__ = ["decode_attention", "varlen_attention"]
