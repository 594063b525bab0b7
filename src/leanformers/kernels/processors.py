"""What a GPU is to kernels: whether ours run on it, and how many programs it runs at once."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch


@torch.compiler.assume_constant_result
def runs_triton(device: torch.device) -> bool:
    """Whether a CUDA device runs Triton kernels: NVIDIA's, Ampere or later."""
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; a small number stands in under Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU, as torch tells it, but without asking the driver before every launch."""
    return torch.cuda.get_device_capability(device)


@lru_cache
def bandwidth(device: torch.device) -> float:
    """Bytes a second that its memory gives to each multiprocessor of a GPU, as built; 0 where it is not known."""
    if device.type != "cuda":
        return 0.0
    properties = torch.cuda.get_device_properties(device)
    kilohertz, bits = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    return 2e3 * kilohertz * bits / 8 / properties.multi_processor_count
