"""A failed export said in one sentence: the layer in which it failed, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from leanformers.errors import LeanError

_TELLING = ("No conversion rule found",)  # the line that matters where it is not an error's first


@contextmanager
def blaming(module: torch.nn.Module, form: str) -> Iterator[None]:
    """Turns whatever an exporter raises into a LeanError that names the layer, where that can be told."""
    try:
        yield
    except (LeanError, MemoryError, OSError):  # OSError: a full disk is said elsewhere
        raise
    except Exception as error:
        where = _layer(error, module)
        raise LeanError(
            f"{type(module).__name__} cannot be exported to {form}{where and f' at {where}'} ({_reason(error)}): "
            "run it in the runtime 'torch', or leave out what put this layer there."
        ) from error


def _chain(error: BaseException) -> list[BaseException]:
    """The error, what caused it, and so on inwards."""
    found: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and inner not in found:
        found.append(inner)
        inner = inner.__cause__
    return found


def _layer(error: BaseException, module: torch.nn.Module) -> str:
    """Name and class of the innermost submodule that was being traced, or whose operation was being translated."""
    names = {id(child): name for name, child in module.named_modules() if name}
    for inner in reversed(_chain(error)):
        found, traceback = "", inner.__traceback__
        while traceback is not None:
            found = _named(traceback, names) or found
            traceback = traceback.tb_next
        if found:
            return found
    return ""


def _named(traceback: TracebackType, names: dict[int, str]) -> str:
    variables: dict[str, Any] = traceback.tb_frame.f_locals
    owner, node = variables.get("self"), variables.get("node")
    if id(owner) in names:
        return f"{names[id(owner)]}, a {type(owner).__name__}"
    if isinstance(node, torch.fx.Node) and node.meta.get("nn_module_stack"):
        path, kind = list(node.meta["nn_module_stack"].values())[-1]
        return f"{path}, a {str(kind).rsplit('.', 1)[-1]}"
    return ""


def _reason(error: BaseException) -> str:
    innermost = _chain(error)[-1]
    lines = [line.strip(" -") for line in str(innermost).splitlines() if line.strip(" -")]
    telling = [line for line in lines if line.startswith(_TELLING)]
    return ([*telling, *lines, type(innermost).__name__][0]).rstrip(".:")
