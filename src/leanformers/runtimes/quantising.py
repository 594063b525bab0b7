"""int8 by the runtimes' own tools: dynamic in ONNX Runtime, calibrated in OpenVINO.

ONNX Runtime's static int8 is left out: on MiniLM it was no faster than the dynamic one, and far less exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from leanformers.parts.quantised import QuantisedLinear


def quantizer(form: str, calibration: list[dict[str, Any]]) -> Any:
    """transformers' export quantizer: ONNX Runtime's dynamic int8 for `onnx`, NNCF's int8 for `openvino`.

    Args:
        calibration: the module's keyword arguments, one dict per batch, for NNCF.
    """
    from transformers import exporters

    if form == "openvino":
        return exporters.NNCFOpenVINOQuantizer(calibration_dataset=calibration)
    # Without VNNI the kernel of signed weights adds two products in 16 bits, which weights of 7 bits cannot overflow.
    # Embeddings are left to the edit that has a scale for each of their rows.
    return exporters.OnnxRuntimeQuantizer(
        exporters.OnnxRuntimeDynamicConfig(op_types_to_quantize=["MatMul"], per_channel=True, reduce_range=True)
    )


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Inside, linears of the scheme int8_dynamic do not round their inputs: what every export of them computes.

    In a graph the rounding would cost time and gain none, since the product is one of floats there. Nor would
    it be the same: a value between two integers goes the other way for a difference in the last bit.
    """
    rounding = [part for part in model.modules() if isinstance(part, QuantisedLinear) and part.scheme == "int8_dynamic"]
    for part in rounding:
        part.scheme = "int8_weight_only"
    try:
        yield
    finally:
        for part in rounding:
            part.scheme = "int8_dynamic"


@contextmanager
def floats(model: nn.Module) -> Iterator[None]:
    """Inside, linears held in int8 are plain ones of the values that they stand for: what a quantiser takes."""
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantisedLinear):
                swapped.append((parent, name, child))
                setattr(parent, name, _plain(child))
    try:
        yield
    finally:
        for parent, name, child in swapped:
            setattr(parent, name, child)


def _plain(part: QuantisedLinear) -> nn.Linear:
    linear = nn.Linear(part.in_features, part.out_features, part.bias is not None, device="meta")
    linear.weight = nn.Parameter(part.dequantise(), requires_grad=False)
    if part.bias is not None:
        linear.bias = part.bias
    return linear.eval()
