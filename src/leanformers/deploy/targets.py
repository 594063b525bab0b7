"""What a model can be exported to: one entry a target, each with how it is written and how it is opened again.

To add one, write a function that writes a folder and one that opens it, and add an entry to `TARGETS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from leanformers.errors import LeanError
from leanformers.runtimes import Prepared, check, prepare
from leanformers.runtimes.accuracy import check_drop
from leanformers.runtimes.running import BY_BATCH, CALIBRATION, at_first_batch

GGUF, PACKAGE = "model.gguf", "model.pt2"
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One thing to export to.

    runtime: what runs the folder, a name of `leanformers.runtimes`. formats: what `quantize=` may say, with what
    it is called where the model is written; None is the model's own floats. write: (model, tokenizer, task,
    folder, format). open: (folder, model, task) -> the call of a Prepared. tolerance: of the outputs, as a share
    of their scale, where the format is None. within: as write, with max_drop instead of a format, where the target
    can be quantised as far as the quality allows.
    """

    name: str
    runtime: str
    write: Callable[[Any, Any, Any, Path, str | None], None]
    open: Callable[[Path, Any, Any], Callable[[Any], torch.Tensor]]
    formats: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 1e-3
    within: Callable[[Any, Any, Any, Path, float], None] | None = None

    def check(self, quantize: str | None, max_drop: float | None = None) -> str | None:
        """The format that `quantize` means, once it is known that the target's runtime is here.

        Raises:
            LeanError: the runtime is not installed, the target has no such format, or none that bounds its loss.
        """
        if max_drop is not None:
            if self.within is None or quantize is None:
                able = next(entry for entry in TARGETS.values() if entry.within is not None)
                raise LeanError(
                    f"max_drop bounds what the quantisation to {', '.join(able.formats)} for {able.name} may lose: "
                    "export to that, or leave it out"
                )
            check_drop(max_drop)
        if quantize is not None and quantize not in self.formats:
            known = ", ".join(self.formats) or "none"
            raise LeanError(f"an export to {self.name} cannot be quantised as {quantize!r}; there is {known}")
        check(self.runtime)
        return None if quantize is None else self.formats[quantize]

    def prepare(self, folder: Path, model: Any, task: Any, quantize: str | None = None) -> Prepared:
        """The folder's model, ready to answer the task on the CPU; `model` is its source."""
        name = RUNTIME_OF.get((self.name, quantize), f"{self.runtime}-{quantize}" if quantize else self.runtime)
        call = self.open(folder, model, task)
        details = {"dtype": quantize or "float32"}
        by_batch = quantize is not None and self.formats[quantize] == BY_BATCH
        return Prepared(name=name, call=call, device=CPU, source=model, details=details, by_batch=by_batch)


def target(name: str) -> Target:
    """The target of that name.

    Raises:
        LeanError: there is none.
    """
    if name not in TARGETS:
        raise LeanError(f"there is no export to {name!r}; choose one of {', '.join(TARGETS)}")
    return TARGETS[name]


# -- graphs by transformers' exporters ---------------------------------------------------------------------------

_DECODER = "a decoder is exported to {} in floats alone: export to gguf to quantise it"


def _graph(form: str) -> Callable[..., None]:
    def write(model: Any, tokenizer: Any, task: Any, folder: Path, quantize: str | None) -> None:
        from leanformers.runtimes.exported import export_model
        from leanformers.runtimes.generation import export_generation
        from leanformers.runtimes.saved import save

        if task.kind == "causal-lm":
            if quantize is not None:
                raise LeanError(_DECODER.format(form))
            save(export_generation(model, tokenizer, form), folder, task, tokenizer)
            return
        batches = list(task.calibration(tokenizer, CALIBRATION if quantize else 4, 1))
        save(export_model(model, task, form, calibration=batches, quantize=quantize), folder, task, tokenizer)

    return write


def _write_within(model: Any, tokenizer: Any, task: Any, folder: Path, max_drop: float) -> None:
    from leanformers.runtimes.accuracy import export_within
    from leanformers.runtimes.saved import save

    if task.kind == "causal-lm":
        raise LeanError(_DECODER.format("openvino"))
    batches = list(task.calibration(tokenizer, CALIBRATION, 1))
    save(export_within(model, task, tokenizer, calibration=batches, max_drop=max_drop), folder, task, tokenizer)


def _open_graph(folder: Path, model: Any, task: Any) -> Callable[[Any], torch.Tensor]:
    from leanformers.runtimes.generation import score
    from leanformers.runtimes.saved import open_exported

    exported = open_exported(folder)
    if task.kind == "causal-lm":
        return lambda batch: score(exported, batch["input_ids"], batch["attention_mask"])
    return at_first_batch(model, task, lambda call: exported.runners["model"], CPU)


def _write_package(model: Any, tokenizer: Any, task: Any, folder: Path, quantize: str | None) -> None:
    from leanformers.runtimes.aot import compile_package
    from leanformers.runtimes.exported import export_model, plain_config

    exported = export_model(model, task, "dynamo", calibration=task.calibration(tokenizer, 4, 1))
    compile_package(exported, folder / PACKAGE)
    plain_config(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _open_package(folder: Path, model: Any, task: Any) -> Callable[[Any], torch.Tensor]:
    from leanformers.runtimes.aot import load_package

    package = load_package(folder / PACKAGE)
    return at_first_batch(model, task, lambda call: package, CPU)


# -- llama.cpp ---------------------------------------------------------------------------------------------------


def _write_gguf(model: Any, tokenizer: Any, task: Any, folder: Path, quantize: str | None) -> None:
    from leanformers.runtimes.gguf import quantize_gguf, write_gguf

    if quantize in (None, "f32", "bf16"):
        write_gguf(model, tokenizer, folder / GGUF, quantize or "f16")
        return
    whole = write_gguf(model, tokenizer, folder / f".{GGUF}", "f16")
    quantize_gguf(whole, folder / GGUF, quantize)
    whole.unlink()


def _open_gguf(folder: Path, model: Any, task: Any) -> Callable[[Any], torch.Tensor]:
    from leanformers.runtimes.llama_cpp import Session

    session = Session(folder / GGUF)
    return lambda batch: session.batch_logits(batch["input_ids"], batch["attention_mask"])


# -- stock -------------------------------------------------------------------------------------------------------


def _write_stock(model: Any, tokenizer: Any, task: Any, folder: Path, quantize: str | None) -> None:
    from leanformers.deploy.stock import check_stock
    from leanformers.execute import save_checkpoint

    check_stock(model)
    save_checkpoint(folder, model, tokenizer, task)


def _open_stock(folder: Path, model: Any, task: Any) -> Callable[[Any], torch.Tensor]:
    return prepare(type(model).from_pretrained(folder), task).call


TARGETS = {
    entry.name: entry
    for entry in (
        Target(
            name="onnx",
            runtime="onnxruntime",
            write=_graph("onnx"),
            open=_open_graph,
            formats={"int8": "int8-dynamic"},
        ),
        Target(
            name="openvino",
            runtime="openvino",
            write=_graph("openvino"),
            open=_open_graph,
            formats={"int8": "int8"},
            within=_write_within,
        ),
        Target(
            name="gguf",
            runtime="llama.cpp",
            write=_write_gguf,
            open=_open_gguf,
            formats={kind: kind for kind in ("f32", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")},
            tolerance=5e-2,  # of f16
        ),
        Target(name="torch", runtime="torch-aot", write=_write_package, open=_open_package),
        Target(name="stock", runtime="torch", write=_write_stock, open=_open_stock, tolerance=0.0),
    )
}

DEPLOYED: dict[str, tuple[str, str | None]] = {
    "onnxruntime": ("onnx", None),
    "onnxruntime-int8": ("onnx", "int8"),
    "openvino": ("openvino", None),
    "openvino-int8": ("openvino", "int8"),
    "torch-aot": ("torch", None),
    "llama.cpp": ("gguf", None),
    "llama.cpp-q8_0": ("gguf", "q8_0"),
    "llama.cpp-q4_k_m": ("gguf", "q4_k_m"),
}
"""Runtimes that run an exported folder: the target and the format that make it."""

RUNTIME_OF = {what: name for name, what in DEPLOYED.items()}


def quantises(runtime: str) -> bool:
    """Whether this runtime's export makes linears of fewer bits out of what the model holds."""
    return DEPLOYED.get(runtime, ("", None))[1] is not None


def width_multiple(runtimes: Iterable[str]) -> int:
    """What a model's widths should be multiples of to be stored in all these runtimes' own formats; 1: anything."""
    from leanformers.runtimes.gguf import row_multiple

    kinds = [DEPLOYED[name][1] or "f16" for name in runtimes if DEPLOYED.get(name, ("", None))[0] == "gguf"]
    return math.lcm(*(row_multiple(kind) for kind in kinds))
