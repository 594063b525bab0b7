"""What a training changes about a model and a process for its time, and puts back: contexts."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from leanformers.errors import LeanError

_HALF = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def kept_randomness() -> Iterator[None]:
    """Trainer seeds every generator of the process; put them back as they were."""
    import numpy

    python, legacy = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(legacy)


@contextlib.contextmanager
def master_weights(model: nn.Module, mixed: bool | None) -> Iterator[bool]:
    """Train half-precision weights in float32, where small steps are not lost; cast back at the end, one by one.

    mixed: whether the forward pass computes in bfloat16. Then frozen weights keep their type, else all are cast. None:
        where something trained is in half precision and the device computes in bfloat16 at speed, or something frozen
        is in half precision, which shall not take twice its memory.

    Yields:
        What it came to: whether the forward pass is to run in bfloat16.
    """
    halves = [t for t in [*model.parameters(), *model.buffers()] if t.dtype in _HALF and _is_plain(t)]
    trained = [t for t in halves if t.requires_grad]
    if mixed is None:
        device = next(model.parameters()).device
        frozen = any(isinstance(t, nn.Parameter) and not t.requires_grad for t in halves)
        if device.type == "cuda":
            able = torch.cuda.is_bf16_supported()
        else:  # its norms do not take float16 weights beside bfloat16
            able = all(t.dtype == torch.bfloat16 for t in halves)
        mixed = bool(trained) and able and (device.type == "cuda" or frozen)
    chosen = trained if mixed or not trained else halves
    before = {tensor: tensor.dtype for tensor in chosen}
    for tensor in before:
        tensor.data = tensor.data.float()
    try:
        yield mixed
    finally:
        for tensor, dtype in before.items():
            tensor.data = tensor.data.to(dtype)


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter)


@contextlib.contextmanager
def frozen(model: Any, names: Sequence[str], beside: nn.Module | None = None) -> Iterator[None]:
    """Take modules out of training: "embeddings", the input token table, "all", or paths in the model or its base.

    beside: what is trained beside the model, if anything is.

    Raises:
        LeanError: a name that is no module, or nothing is left to train.
    """
    chosen: list[nn.Parameter] = []
    for name in names:
        named = {"embeddings": model.get_input_embeddings, "all": lambda: model}
        module = named[name]() if name in named else _find(model, name)
        if module is None:
            raise LeanError(
                f"{type(model).__name__} has no module {name!r} to freeze; use 'embeddings', 'all' or a module path."
            )
        chosen += [p for p in module.parameters() if p.requires_grad]
    for parameter in chosen:
        parameter.requires_grad_(False)
    try:
        trained = [*model.parameters(), *(beside.parameters() if beside is not None else ())]
        if not any(p.requires_grad for p in trained):
            raise LeanError("Nothing is left to train: every parameter of the model is frozen or quantised.")
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(True)


def _find(model: Any, path: str) -> nn.Module | None:
    for root in (model, getattr(model, "base_model", model)):
        with contextlib.suppress(AttributeError):
            return root.get_submodule(path)
    return None


@contextlib.contextmanager
def dropout(model: nn.Module, probability: float | None) -> Iterator[None]:
    """Train with another dropout probability than the model's own; None changes nothing."""
    before: list[tuple[nn.Module, str, float]] = []
    if probability is not None:
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                before.append((module, "p", module.p))
            # Several families keep the probabilities of attention and feed-forward as plain numbers.
            for name in ("attention_dropout", "activation_dropout", "dropout", "dropout_prob"):
                value = module.__dict__.get(name)
                if isinstance(value, float):
                    before.append((module, name, value))
    for module, name, _ in before:
        setattr(module, name, probability)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextlib.contextmanager
def without_cache(model: Any) -> Iterator[None]:
    """No key/value cache: a decoder would fill one at each step and never use it."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True


def finite(model: nn.Module) -> bool:
    """Whether all trainable weights are numbers."""
    with torch.no_grad():
        # One sum per tensor: a NaN or an infinity survives it.
        return all(bool(torch.isfinite(p.float().sum())) for p in model.parameters() if p.requires_grad)
