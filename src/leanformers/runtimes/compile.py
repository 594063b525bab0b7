"""`torch.compile` with dynamic shapes: one graph for all batch sizes and lengths.

Compilation happens at the first calls and takes from seconds to a minute; whoever times a `Prepared` warms it
up first (`leanformers.measure` does). Outputs agree with eager PyTorch to rounding, not bit for bit.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch

from leanformers.compiling import compile_dynamic
from leanformers.runtimes.base import Batch, Prepared, Runnable, runtime
from leanformers.runtimes.torch import details_of, device_of


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


@runtime("torch-compile", refusal=missing_compiler)
def prepare(model: Any, task: Runnable) -> Prepared:
    """PyTorch compiled for this machine, with dynamic shapes."""
    model.eval()

    def forward(batch: Batch) -> torch.Tensor:
        return task.forward(model, batch)

    # The task's forward is compiled as a whole: it may reach for a part of the model (the base of an
    # embedder), which a compiled wrapper of the model would hand out uncompiled.
    compiled = compile_dynamic(forward)

    def call(batch: Batch) -> torch.Tensor:
        with torch.inference_mode():
            return compiled(batch)

    details = details_of(model) | {"shapes": "dynamic"}
    return Prepared(name="torch-compile", call=call, device=device_of(model), source=model, details=details)
