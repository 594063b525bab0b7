"""Launching a Triton kernel again, without asking Triton anew which of its compiled forms fits the arguments.

Triton looks at every argument of every launch, in Python. Where a kernel runs for 20 us and no CUDA graph replays it,
that takes longer than the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class Launcher:
    """One kernel (`triton.jit`), whose constants (`tl.constexpr`) come last; its compiled forms are kept by argument.

    Compiled forms differ by what Triton specialises on: the type of an argument, whether it is 1 or a multiple of 16,
    whether a tensor begins at a multiple of 16 bytes, the constants and the options.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._constants: list[str] = []

    def __call__(
        self, grid: tuple[int, int, int], arguments: Sequence[Any], constants: Mapping[str, Any], **options: Any
    ) -> None:
        """Launch on the current device and stream; options as Triton takes them (num_warps, launch_pdl)."""
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        key = (device, *map(_form, arguments), *constants.values(), *options.values())
        if (compiled := self._compiled.get(key)) is not None:
            compiled[grid](*arguments, *(constants[name] for name in self._constants))
            return
        compiled = self._kernel[grid](*arguments, **constants, **options)
        if device is not None and torch.version.hip is None:  # nor by the interpreter, which compiles nothing
            self._constants = [parameter.name for parameter in self._kernel.params if parameter.is_constexpr]
            self._compiled[key] = compiled


def _form(argument: Any) -> Any:
    if type(argument) is int:
        return argument % 16 == 0, argument == 1, argument >= 2**31
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return type(argument)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, wherever the tensors are: inside, that is the tensor's. Cheap where it is."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
