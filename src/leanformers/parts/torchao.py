"""The one door to torchao, which is optional, slow to import and talkative."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from leanformers.errors import LeanError


@contextmanager
def _hushed(*names: str) -> Iterator[None]:
    """Lets only errors of these loggers through: torchao warns of GPU libraries that a CPU torch lacks."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def quantization() -> Any:
    """The module `torchao.quantization`.

    Raises:
        LeanError: torchao is not installed.
    """
    try:
        with _hushed("torchao", "torch.utils._pytree"):
            import torchao.quantization
    except ImportError as error:
        raise LeanError("Quantising needs torchao; install it with: pip install 'leanformers[quant]'") from error
    return torchao.quantization


@torch.no_grad()
def quantise_rows(weight: torch.Tensor, reduce_range: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """torchao's symmetric int8, one scale per row: float `[rows, columns]` -> int8 and float32 `[rows, 1]`.

    Args:
        weight: the matrix, of any float dtype.
        reduce_range: integers of -64 ... 63 instead of -128 ... 127.

    Raises:
        LeanError: torchao is not installed, or the weight holds a NaN or an infinity.
    """
    if not torch.isfinite(weight).all():
        raise LeanError("The weight holds a NaN or an infinity; it cannot be quantised.")
    ao = quantization()
    holder: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    # The inductor settings are the whole process's, not this layer's: left as they are.
    settings = {"granularity": ao.PerRow(), "set_inductor_config": False}
    if reduce_range:
        config = ao.Int8DynamicActivationInt8WeightConfig(**settings, reduce_range=True)
    else:
        config = ao.Int8WeightOnlyConfig(**settings)
    ao.quantize_(holder, config)
    names, _ = holder.weight.__tensor_flatten__()
    if "zero_point" in names and holder.weight.zero_point.any():
        raise LeanError("torchao returned an asymmetric weight; install torchao>=0.18,<0.19.")
    return holder.weight.qdata, holder.weight.scale.float().reshape(-1, 1)
