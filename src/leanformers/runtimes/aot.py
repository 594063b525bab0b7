"""An AOTInductor package: the graph of `torch.export`, compiled to machine code that needs no Python of the model.

Export and compilation happen at the first batch and take up to a minute; whoever times a `Prepared` warms it up
first. Outputs agree with eager PyTorch to rounding. A package is made for this machine's processor.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leanformers.runtimes.base import Prepared, Runnable, runtime
from leanformers.runtimes.calling import Call
from leanformers.runtimes.compile import missing_compiler
from leanformers.runtimes.exported import missing, trace, weight_bytes
from leanformers.runtimes.hushing import hushed
from leanformers.runtimes.running import at_first_batch
from leanformers.runtimes.torch import details_of, device_of

NAME = "torch-aot"


def refusal() -> str | None:
    """One sentence if transformers exports nothing here or this machine cannot compile, else None."""
    sentence = missing_compiler()
    return missing(f"the runtime {NAME!r}", "dynamo") or (sentence and sentence.replace("torch-compile", NAME))


def compile_package(exported: Any, path: str | Path) -> Path:
    """Compile an `ExportedModel` of the form "dynamo" to the package `path` (ending in .pt2)."""
    from torch._inductor import aoti_compile_and_package

    with hushed():
        return Path(aoti_compile_and_package(exported.program, package_path=str(path)))


def load_package(path: str | Path) -> Callable[..., Any]:
    """What a package holds, to be called with the tensors that the model was traced with."""
    from torch._inductor import aoti_load_package

    with hushed():
        return aoti_load_package(str(path))


@runtime(NAME, refusal=refusal)
def prepare(model: Any, task: Runnable) -> Prepared:
    """PyTorch compiled ahead of time for this machine, with dynamic shapes."""
    model.eval()
    device = device_of(model)

    held: list[int] = []

    def load(call: Call) -> Callable[..., Any]:
        exported = trace(call, "dynamo")
        held.append(weight_bytes(exported))
        with tempfile.TemporaryDirectory() as folder:  # the package is unpacked elsewhere when it is loaded
            return load_package(compile_package(exported, Path(folder) / "model.pt2"))

    details = details_of(model) | {"shapes": "dynamic"}
    call = at_first_batch(model, task, load, device)
    return Prepared(
        name=NAME, call=call, device=device, source=model, details=details, held=lambda: held[0] if held else None
    )
