"""Packed encoders (`leanformers.packing`): PyTorch without padding, as it is or compiled.

The outputs are the padded model's but for rounding. A model that cannot be packed is refused, never run padded under
this name. On a GPU the compiled one replays CUDA graphs too.
"""

from __future__ import annotations

from typing import Any

import torch

from leanformers.packing import pack
from leanformers.runtimes.base import Batch, Prepared, Runnable, runtime
from leanformers.runtimes.compile import missing_compiler
from leanformers.runtimes.torch import details_of, device_of


@runtime("torch-packed")
def prepare(model: Any, task: Runnable) -> Prepared:
    """PyTorch without padding, for encoders."""
    return _prepared("torch-packed", model, task)


@runtime("torch-packed-compile", refusal=missing_compiler)
def prepare_compiled(model: Any, task: Runnable) -> Prepared:
    """PyTorch without padding and compiled, for encoders."""
    return _prepared("torch-packed-compile", model, task, compile=True, graphs=True)


def _prepared(name: str, model: Any, task: Runnable, **options: bool) -> Prepared:
    model.eval()
    packed = pack(model, **options)

    def call(batch: Batch) -> torch.Tensor:
        with torch.inference_mode():
            return task.forward(packed, batch)

    details = details_of(model) | {"attention": "packed"}
    return Prepared(name=name, call=call, device=device_of(model), source=model, details=details)
