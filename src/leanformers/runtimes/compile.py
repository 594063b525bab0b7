"""`torch.compile` with dynamic shapes: one graph for all batch sizes and lengths.

Compilation happens at the first calls and takes from seconds to a minute; whoever times a `Prepared` warms it
up first (`leanformers.measure` does). Outputs agree with eager PyTorch to rounding, not bit for bit.

Each model gets a compilation cache of its own. Dynamo otherwise counts recompilations per *code object*,
which all models of a class share: a search over a dozen BERTs would meet the limit and run eagerly without a
word. Past the limit it raises here instead of falling back.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from leanformers.runtimes.base import Batch, Prepared, Runnable, runtime
from leanformers.runtimes.torch import details_of, device_of

RECOMPILE_LIMIT = 64
_ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters  # came after torch 2.11


def missing_compiler() -> str | None:
    """One sentence if this machine cannot compile what torch.compile writes in C++, else None."""
    remedy = "or use the runtime 'torch'."
    compiler = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([compiler] if compiler else ["g++", "clang++", "c++", "cl"])):
        named = f"the C++ compiler {compiler!r} that CXX names" if compiler else "a C++ compiler"
        return f"The runtime 'torch-compile' needs {named}, which is not here: install g++ {remedy}"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return f"The runtime 'torch-compile' needs Python's header files: install python3-dev {remedy}"
    return None


def _compile(function: Callable[[Batch], torch.Tensor]) -> Callable[[Batch], torch.Tensor]:
    options: dict[str, Any] = {"dynamic": True}
    if _ISOLATES:
        options |= {"isolate_recompiles": True, "recompile_limit": RECOMPILE_LIMIT}
    return torch.compile(function, **options)


@runtime("torch-compile", refusal=missing_compiler)
def prepare(model: Any, task: Runnable) -> Prepared:
    """PyTorch compiled for this machine, with dynamic shapes."""
    from torch._dynamo import config

    model.eval()

    def forward(batch: Batch) -> torch.Tensor:
        return task.forward(model, batch)

    # The task's forward is compiled as a whole: it may reach for a part of the model (the base of an
    # embedder), which a compiled wrapper of the model would hand out uncompiled.
    compiled = _compile(forward)
    limits: dict[str, Any] = {"fail_on_recompile_limit_hit": True, "accumulated_recompile_limit": 1 << 16}
    if not _ISOLATES:
        limits["recompile_limit"] = 1 << 12

    def call(batch: Batch) -> torch.Tensor:
        with config.patch(**limits), torch.inference_mode():
            return compiled(batch)

    details = details_of(model) | {"shapes": "dynamic"}
    return Prepared(name="torch-compile", call=call, device=device_of(model), source=model, details=details)
