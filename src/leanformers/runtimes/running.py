"""Running exported graphs: one way for all runtimes that hold one, and the threads that each may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from leanformers.errors import LeanError
from leanformers.runtimes.base import Batch, Prepared, Runnable
from leanformers.runtimes.calling import Call, StandIn, call_of
from leanformers.runtimes.exported import QUANTISED, trace, weight_bytes
from leanformers.runtimes.torch import details_of

BY_BATCH = QUANTISED["onnx"]  # takes each activation's range from a batch as a whole
CALIBRATION = 128  # training rows, each a batch of its own so that padding has no say


def prepare_exported(
    name: str, model: Any, task: Runnable, form: str, *, quantize: str | None = None, tokenizer: Any = None
) -> Prepared:
    """A `Prepared` whose graph is exported and loaded at the first batch, which then shapes it.

    Args:
        name: of the runtime. form, quantize: as in `export_model`.
        tokenizer: for the calibration of "int8"; found beside the model where it is not given.
    """
    model.eval()
    held: list[int] = []

    def load(call: Call) -> Callable[..., Any]:
        batches = calibration_of(model, task, tokenizer) if quantize == "int8" else []
        exported = trace(call, form, quantize, [call_of(task, model, batch).tensors for batch in batches])
        held.append(weight_bytes(exported))
        return exported.to("cpu", **options(form)).runners["model"]

    details = {"dtype": "int8" if quantize else details_of(model)["dtype"], "threads": str(torch.get_num_threads())}
    device = torch.device("cpu")
    call = at_first_batch(model, task, load, device)
    by_batch = quantize == BY_BATCH
    return Prepared(
        name=name, call=call, device=device, source=model, details=details, by_batch=by_batch,
        held=lambda: held[0] if held else None,
    )  # fmt: skip


def at_first_batch(
    model: Any, task: Runnable, load: Callable[[Call], Callable[..., Any]], device: torch.device
) -> Callable[[Batch], torch.Tensor]:
    """`task.forward` on what `load` makes of the call that the first batch leads to."""
    ready: list[StandIn] = []

    def call(batch: Batch) -> torch.Tensor:
        if not ready:
            first = call_of(task, model, batch)
            ready.append(StandIn(load(first), frozenset(first.tensors), getattr(model, "config", None), device))
        with torch.inference_mode():
            return task.forward(ready[0], batch)

    return call


def options(form: str) -> dict[str, Any]:
    """Arguments of transformers' runner of a form: as many threads as torch uses, so that runtimes compare."""
    threads = torch.get_num_threads()
    if form == "openvino":
        # Where a CPU multiplies in bfloat16, OpenVINO would take that for floats without being asked.
        return {"config": {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}}
    if form == "onnx":
        from onnxruntime import SessionOptions

        session = SessionOptions()
        session.intra_op_num_threads = threads
        # Threads that go on spinning after a run would slow whatever is timed next.
        session.add_session_config_entry("session.force_spinning_stop", "1")
        return {"session_options": session}
    return {}


def calibration_of(model: Any, task: Any, tokenizer: Any = None, samples: int = CALIBRATION) -> list[Batch]:
    """Training rows of the task as batches of one.

    Raises:
        LeanError: no tokenizer is given and none that fits lies beside the model, or the task has no training
            rows.
    """
    if not hasattr(task, "calibration"):
        raise LeanError("int8 takes the ranges of its activations from training rows, which this task does not give.")
    if tokenizer is None:
        from leanformers.tasks import load

        tokenizer = load(model, task)[1]
        if len(tokenizer) > model.config.vocab_size:
            raise LeanError(
                "The tokenizer beside the model is not its own since its vocabulary was cut: pass the tokenizer."
            )
    batches = list(task.calibration(tokenizer, samples, 1))
    if not batches:
        raise LeanError(f"Task {task.name} has no training rows, which int8 takes the ranges of its activations from.")
    return batches
