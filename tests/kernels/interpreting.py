"""Triton kernels on the CPU: run them by Triton's interpreter, which `TRITON_INTERPRET=1` must choose before import."""

from __future__ import annotations

import importlib.util
import os

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: pip install triton")


def interpret() -> None:
    """Choose the interpreter for every kernel imported from here on; nothing without Triton or with a GPU."""
    import torch

    if not HAS_TRITON or torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    stock = interpreter._patch_lang_tensor
    if getattr(stock, "for_new_numpy", False):
        return

    def patch(tensor, scope):  # numpy 2.4 turns no [1] array into an int, which Triton 3.6 asks of it in range()
        stock(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch.for_new_numpy = True
    interpreter._patch_lang_tensor = patch
