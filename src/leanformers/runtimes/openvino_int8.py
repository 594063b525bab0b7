"""Linears that a model holds in int8, kept in int8 in an OpenVINO graph.

OpenVINO's converter folds the cast of a constant, so that int8 weights become floats, four bytes each. Written the way
in which its own tools compress weights (a constant in int8, its cast, its scales, the product), they stay as they are
in the file, and in memory on devices that multiply so. The product is one of floats as before, to rounding.
"""

from __future__ import annotations

from typing import Any

import numpy


def keep_int8(graph: Any) -> int:
    """Rewrite in place each product of an `openvino.Model` with a matrix of int8 values and a scale per output.

    Returns:
        How many there were.
    """
    from openvino import opset13 as ops  # type: ignore[import-untyped]

    found = 0
    for product in graph.get_ops():
        if (parts := _parts(product)) is None:
            continue
        matrix, multiply, scale = parts
        integers = ops.convert(ops.constant(matrix.astype(numpy.int8)), "f32")
        weight = ops.multiply(integers, ops.constant(scale.reshape(-1, 1)))
        scaled = ops.matmul(product.input_value(0), weight, False, True)
        scaled.set_friendly_name(product.get_friendly_name())
        multiply.output(0).replace(scaled.output(0))
        found += 1
    if found:  # devices may round activations to int8 as well where weights are: the model did not ask for it
        graph.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        graph.validate_nodes_and_infer_types()
    return found


def _parts(product: Any) -> tuple[Any, Any, Any] | None:
    """(matrix [out, in], the node that scales the product, scales [out]); None for any other node."""
    if product.get_type_name() != "MatMul" or product.get_attributes() != {"transpose_a": False, "transpose_b": True}:
        return None
    matrix = _constant(product.input_value(1))
    readers = product.output(0).get_target_inputs()
    if matrix is None or matrix.ndim != 2 or len(readers) != 1:
        return None
    multiply = next(iter(readers)).get_node()
    if multiply.get_type_name() != "Multiply":
        return None
    scales = [value for value in map(_constant, multiply.input_values()) if value is not None]
    if len(scales) != 1 or scales[0].size != len(matrix) or scales[0].shape[-1] != len(matrix):
        return None
    whole = matrix.min() >= -128 and matrix.max() <= 127 and bool((matrix == numpy.rint(matrix)).all())
    return (matrix, multiply, scales[0]) if whole else None


def _constant(value: Any) -> Any:
    """The float32 values of a constant; None for anything else."""
    node = value.get_node()
    if node.get_type_name() != "Constant" or str(node.get_element_type().get_type_name()) != "f32":
        return None
    return node.data
