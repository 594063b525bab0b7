"""OpenVINO, in floats and in int8 calibrated by NNCF.

The graph is exported at the first batch, which takes some seconds; whoever times a `Prepared` warms it up
first. In floats the outputs agree with PyTorch to rounding: a CPU that multiplies in bfloat16 is not asked to.
In int8 the ranges of the activations come from rows of the task's training split.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from leanformers.runtimes.base import Prepared, Runnable, runtime
from leanformers.runtimes.exported import missing
from leanformers.runtimes.running import prepare_exported


@runtime("openvino", refusal=partial(missing, "the runtime 'openvino'", "openvino"))
def prepare(model: Any, task: Runnable) -> Prepared:
    """OpenVINO in float32."""
    return prepare_exported("openvino", model, task, "openvino")


@runtime("openvino-int8", refusal=partial(missing, "the runtime 'openvino-int8'", "openvino", "int8"))
def prepare_int8(model: Any, task: Runnable, tokenizer: Any = None) -> Prepared:
    """OpenVINO with int8 linears, calibrated on training rows of the task."""
    return prepare_exported("openvino-int8", model, task, "openvino", quantize="int8", tokenizer=tokenizer)
