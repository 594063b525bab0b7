"""llama.cpp: decoders on the CPU, from a GGUF file that is written for the purpose.

Rows of a batch are run one after another, and their padding is skipped.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from leanformers.errors import LeanError
from leanformers.runtimes.base import Batch, Prepared, Runnable, runtime
from leanformers.runtimes.llama_session import Session, Written, has_amx, missing_packages, rates

__all__ = ["Session", "Written", "missing_packages", "rates"]


def _prepare(model: Any, task: Runnable, name: str, kind: str | None) -> Prepared:
    from leanformers.runtimes.gguf import quantize_gguf, write_gguf

    given = getattr(task, "kind", "causal-lm")
    if given != "causal-lm":
        raise LeanError(
            f"The runtime {name!r} runs causal language models, and task {getattr(task, 'name', '')} is of the kind "
            f"{given}: choose another runtime."
        )
    model.eval()
    folder = TemporaryDirectory(prefix="leanformers-", ignore_cleanup_errors=True)
    # No tokenizer: what is measured takes token ids.
    path = write_gguf(model, None, Path(folder.name, "model.gguf"))
    if kind is not None:
        whole, path = path, quantize_gguf(path, Path(folder.name, f"{kind}.gguf"), kind)
        whole.unlink()
    session = Session(path)
    weakref.finalize(session, folder.cleanup)  # the folder lives as long as what reads from it

    def call(batch: Batch) -> torch.Tensor:
        return session.batch_logits(batch["input_ids"], batch["attention_mask"])

    size = path.stat().st_size
    details = {"dtype": kind or "f16", "bytes": str(size)}
    if has_amx():
        details["kernels"] = "without AMX and repacking"
    device = torch.device("cpu")
    return Prepared(name=name, call=call, device=device, source=model, details=details, held=lambda: size)


@runtime("llama.cpp", refusal=missing_packages)
def prepare(model: Any, task: Runnable) -> Prepared:
    """llama.cpp on the CPU, decoders alone, weights in f16."""
    return _prepare(model, task, "llama.cpp", None)


@runtime("llama.cpp-q8_0", refusal=missing_packages)
def prepare_q8_0(model: Any, task: Runnable) -> Prepared:
    """llama.cpp on the CPU, decoders alone, weights in 8 bits."""
    return _prepare(model, task, "llama.cpp-q8_0", "q8_0")


@runtime("llama.cpp-q4_k_m", refusal=missing_packages)
def prepare_q4_k_m(model: Any, task: Runnable) -> Prepared:
    """llama.cpp on the CPU, decoders alone, weights in 4 to 6 bits."""
    return _prepare(model, task, "llama.cpp-q4_k_m", "q4_k_m")
