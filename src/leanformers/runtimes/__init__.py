"""Where a model is run: one file per runtime, all called through `prepare(model, task, runtime)`.

To add one, write `runtimes/<name>.py` with a function under `@runtime("<name>")` and import it below.
"""

from leanformers.runtimes.base import (
    Batch,
    Prepared,
    Runtime,
    available,
    check,
    place,
    prepare,
    runtime,
    runtimes,
)
from leanformers.runtimes.torch import device_of

# isort: off
# Each file registers itself; the order is the order of `available()`.
from leanformers.runtimes import compile as _compile  # noqa: F401
from leanformers.runtimes import packed as _packed  # noqa: F401
from leanformers.runtimes import aot as _aot  # noqa: F401
from leanformers.runtimes import onnxruntime as _onnxruntime  # noqa: F401
from leanformers.runtimes import openvino as _openvino  # noqa: F401
from leanformers.runtimes import llama_cpp as _llama_cpp  # noqa: F401

__all__ = [
    "Batch",
    "Prepared",
    "Runtime",
    "available",
    "check",
    "device_of",
    "place",
    "prepare",
    "runtime",
    "runtimes",
]
