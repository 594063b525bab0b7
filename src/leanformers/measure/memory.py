"""Peak memory of running a model, in bytes.

What it is: the bytes of the model's own parameters and buffers, plus the largest rise of memory while it ran.
So it is comparable between models that live in one process, and other things in the process (a teacher, a
cache of data) do not count.

The rise, on a GPU, is `torch.cuda.max_memory_allocated` less what was allocated before. On a CPU it is the
rise of the resident set: free memory is handed back to the system first (glibc's `malloc_trim`), the kernel's
high-water mark is reset (Linux: `/proc/self/clear_refs`) and read after the run (`VmHWM`). Where it cannot be
reset, a thread samples the resident set each millisecond. A resident set counts pages of 4 KiB and what the
allocator keeps, so small models are measured coarsely. None where the system shows neither (not Linux, no
GPU).
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanformers.measure.cost import bytes_in_memory

_STATUS = Path("/proc/self/status")


def peak_memory(call: Callable[[], Any], model: nn.Module, device: torch.device | None = None) -> int | None:
    """Bytes of `model` plus the largest rise of memory during `call()`; see the module for what that means.

    Run `call` once before, so that what is set up once (kernels, buffers of libraries) is not counted.
    """
    rise = gpu_rise(call, device) if device is not None and device.type == "cuda" else cpu_rise(call)
    return None if rise is None else bytes_in_memory(model) + rise


def gpu_rise(call: Callable[[], Any], device: torch.device) -> int:
    """Largest rise of the bytes that torch's allocator has handed out on `device` during `call()`."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before)


def cpu_rise(call: Callable[[], Any]) -> int | None:
    """Largest rise of this process's resident set during `call()`, in bytes; None where it cannot be read."""
    before = _settled()
    if before is None:
        return None
    if _reset_high_water():
        call()
        return max(0, (_status("VmHWM") or before) - before)
    with _Sampler() as sampler:
        call()
    return max(0, sampler.highest - before)


def _settled() -> int | None:
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def _status(name: str) -> int | None:
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


class _Sampler:
    """Reads the resident set each millisecond in a thread and keeps the highest."""

    def __init__(self) -> None:
        self.highest = _status("VmRSS") or 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.highest = max(self.highest, _status("VmRSS") or 0)

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        self._thread.join()
        self.highest = max(self.highest, _status("VmRSS") or 0)
