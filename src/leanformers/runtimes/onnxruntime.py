"""ONNX Runtime, in floats and with int8 weights and activations.

The graph is exported at the first batch, which takes some seconds; whoever times a `Prepared` warms it up
first. In floats the outputs agree with PyTorch to rounding. In int8 every weight matrix has one scale per
output and each activation its range at run time, so nothing is calibrated.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from leanformers.runtimes.base import Prepared, Runnable, runtime
from leanformers.runtimes.exported import missing
from leanformers.runtimes.running import prepare_exported


@runtime("onnxruntime", refusal=partial(missing, "the runtime 'onnxruntime'", "onnx"))
def prepare(model: Any, task: Runnable) -> Prepared:
    """ONNX Runtime in floats."""
    return prepare_exported("onnxruntime", model, task, "onnx")


@runtime("onnxruntime-int8", refusal=partial(missing, "the runtime 'onnxruntime-int8'", "onnx", "int8-dynamic"))
def prepare_int8(model: Any, task: Runnable) -> Prepared:
    """ONNX Runtime with int8 linears, ranges of activations at run time."""
    return prepare_exported("onnxruntime-int8", model, task, "onnx", quantize="int8-dynamic")
