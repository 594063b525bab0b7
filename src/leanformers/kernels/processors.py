"""How many programs a GPU runs at once, for kernels whose programs stay."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; a small number stands in under Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
