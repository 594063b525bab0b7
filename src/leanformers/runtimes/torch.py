"""Plain PyTorch: evaluation mode, inference mode, the attention that the model came with (SDPA by default).

Exact: the outputs are the model's own, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch

from leanformers.runtimes.base import Batch, Prepared, Runnable, runtime


def device_of(model: torch.nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU for a module that has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def details_of(model: Any) -> dict[str, str]:
    """What a report says of a torch model: dtype of its floating-point weights, attention implementation."""
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()})
    details = {"dtype": "+".join(dtypes) or "none"}
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention:
        details["attention"] = str(attention)
    return details


@runtime("torch")
def prepare(model: Any, task: Runnable) -> Prepared:
    """Eager PyTorch, exact."""
    model.eval()

    def call(batch: Batch) -> torch.Tensor:
        with torch.inference_mode():
            return task.forward(model, batch)

    return Prepared(name="torch", call=call, device=device_of(model), source=model, details=details_of(model))
