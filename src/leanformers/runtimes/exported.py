"""From a model and a task to one exported graph: ONNX, OpenVINO or `torch.export`, by transformers' exporters.

The graph is that of the module which the task calls, with the number of rows and the length left open. Its
config carries no ledger: a graph needs no leanformers to run, and `ExportedModel.from_pretrained` opens its
folder with transformers alone.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from leanformers.errors import LeanError
from leanformers.runtimes import onnx_attention
from leanformers.runtimes.base import Batch, Runnable
from leanformers.runtimes.blaming import blaming
from leanformers.runtimes.calling import Call, call_of, dynamic_shapes, sample_of
from leanformers.runtimes.hushing import hushed
from leanformers.runtimes.openvino_int8 import keep_int8
from leanformers.runtimes.quantising import floats, quantizer, unrounded

FORMS = ("onnx", "openvino", "dynamo")
QUANTISED = {"onnx": "int8-dynamic", "openvino": "int8"}  # form -> how its runtime quantises
PACKAGES = {  # form -> extra, the packages that export and run it, by the names that are imported
    "onnx": ("onnx", ("onnx", "onnxruntime", "onnxscript")),
    "openvino": ("openvino", ("openvino",)),
    "dynamo": ("", ()),
}


def missing(what: str, form: str, quantize: str | None = None) -> str | None:
    """One sentence with the remedy if `what` lacks transformers' exporters or a package here, else None."""
    found = importlib.util.find_spec("transformers")
    places = [Path(place) for place in (found.submodule_search_locations or [])] if found else []
    if not any((place / "exporters" / "runners").is_dir() for place in places):
        return f"{what} needs the exporters of transformers 5.23 or later: pip install --upgrade transformers"
    extra, packages = PACKAGES[form]
    wanted = (*packages, "nncf") if quantize == "int8" else packages
    if all(importlib.util.find_spec(name) is not None for name in wanted):
        return None
    names = f"s {', '.join(wanted[:-1])} and {wanted[-1]}" if len(wanted) > 1 else f" {wanted[0]}"
    return f"{what} needs the package{names}: pip install 'leanformers[{extra}]'"


def export_model(
    model: Any,
    task: Runnable,
    form: str,
    *,
    calibration: Iterable[Batch],
    quantize: str | None = None,
) -> Any:
    """Export what `task.forward` calls of `model` as one graph with open numbers of rows and length.

    Args:
        model: a loaded model, lean or not, on the CPU; it is put into evaluation mode and else left as it is.
        task: says which module is called, and with which inputs.
        form: "onnx", "openvino" or "dynamo" (`torch.export`).
        calibration: batches of the task, such as `task.calibration(tokenizer, 64, 1)`. The first shapes the
            graph; "int8" takes the ranges of its activations from all of them.
        quantize: None; "int8-dynamic" for ONNX, ranges of activations at run time; "int8" for OpenVINO, ranges
            from the calibration. Linears that the model holds in int8 itself are quantised anew, from the
            values that they stand for.

    Returns:
        transformers' `ExportedModel`, not yet loaded in a runtime. Without `quantize` it answers as the model
        does to rounding, but for linears of the scheme int8_dynamic: see `quantising.unrounded`.

    Raises:
        LeanError: an unknown form or quantisation, a package that is not installed, no batch, or a module that
            cannot be exported, by name.
    """
    if form not in FORMS:
        raise LeanError(f"There is no export to {form!r}; choose one of {', '.join(FORMS)}.")
    if quantize not in (None, QUANTISED.get(form)):
        known = f"{QUANTISED[form]!r}" if form in QUANTISED else "no quantisation"
        raise LeanError(f"An export to {form} cannot be quantised as {quantize!r}; there is {known}.")
    sentence = missing(f"an export to {form}", form, quantize)
    if sentence is not None:
        raise LeanError(sentence)
    model.eval()
    calls = [call_of(task, model, batch) for batch in calibration]
    if not calls:
        raise LeanError("There is no batch to trace the model with: the task needs at least one training row.")
    return trace(calls[0], form, quantize, [call.tensors for call in calls])


def trace(call: Call, form: str, quantize: str | None = None, calibration: list[dict[str, Any]] | None = None) -> Any:
    """`export_model` of a call that is known already."""
    module, sample = owned(call.module, form), sample_of(call)
    _check_dtype(module, form, quantize)
    settings: dict[str, Any] = {"dynamic_shapes": dynamic_shapes(sample)}
    with (
        hushed(),
        undisturbed(module),
        without_cache(module),
        unrounded(module),
        floats(module) if quantize else contextlib.nullcontext(),
        onnx_attention.fused_attention(module) if form == "onnx" else contextlib.nullcontext(),
        blaming(module, form),
    ):
        if quantize:
            settings["quantizer"] = quantizer(form, calibration or [])
        exported = exporter_class(form)().export(module, sample, settings)
    exported.config = plain_config(module)
    return finished(exported)


def owned(module: Any, form: str) -> Any:
    """The module to export. OpenVINO reads some weights where torch keeps them, for good, so it gets a copy:
    training the model further would change half of its graph."""
    return copy.deepcopy(module) if form == "openvino" else module


def _check_dtype(module: torch.nn.Module, form: str, quantize: str | None) -> None:
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    refused = dtypes - ({torch.float32} if quantize else {torch.float32, torch.float16})
    if form == "onnx" and refused:
        name = str(refused.pop()).removeprefix("torch.")
        raise LeanError(
            f"{type(module).__name__} holds {name} weights, with which ONNX Runtime does not reckon on a CPU: load it "
            "with dtype='float32'."
        )


def exporter_class(form: str) -> Any:
    """transformers' exporter of a form, to be instantiated where its warnings are hushed."""
    from transformers.exporters.auto import get_exporter_class

    return onnx_attention.exporter_class() if form == "onnx" else get_exporter_class(form)


def finished(exported: Any) -> Any:
    """The export without what its exporter does to graphs beyond need.

    Where in this machine's files each node came from is taken out, and linears in int8 are put back into int8.
    """
    for component in exported.components.values():
        if str(exported.export_format) == "openvino":
            keep_int8(component.program)
        graph: Any = getattr(component.program, "graph", None)
        if hasattr(graph, "all_nodes"):  # ONNX
            for node in graph.all_nodes():
                node.metadata_props.clear()
        elif graph is not None:  # torch.export
            for node in graph.nodes:
                node.meta.pop("stack_trace", None)
    return exported


def weight_bytes(exported: Any) -> int:
    """Bytes of the weights and other constants of an export, in the types in which its runtime is given them."""
    return sum(_constants(component.program) for component in exported.components.values())


def _constants(program: Any) -> int:
    if hasattr(program, "get_ops"):  # OpenVINO
        return sum(op.get_byte_size() for op in program.get_ops() if op.get_type_name() == "Constant")
    if hasattr(program, "state_dict"):  # torch.export
        from leanformers.measure.cost import bytes_of  # measures what is prepared here, and so imports this

        tensors = (*program.state_dict.values(), *program.constants.values())
        return bytes_of(t for t in tensors if isinstance(t, torch.Tensor))
    values = (value.const_value for value in program.graph.initializers.values())
    return sum(value.nbytes for value in values if value is not None)


def plain_config(module: Any) -> Any:
    """The module's config without the ledger and its guard: nothing is replayed on a graph."""
    config = copy.deepcopy(getattr(module, "config", None))
    if config is not None:
        config.__dict__.pop("quantization_config", None)
        config.__dict__.pop("transformers_weights", None)
        config.architectures = [type(module).__name__]
    return config


@contextmanager
def undisturbed(module: Any) -> Iterator[None]:
    """Leaves the module as it was: the exporters put a wrapped `forward` on it and leave it there."""
    had = module.__dict__.get("forward")
    try:
        with torch.no_grad():
            yield
    finally:
        if had is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = had


@contextmanager
def without_cache(module: torch.nn.Module) -> Iterator[None]:
    """Inside, no stack of the module returns its keys and values, which no task compares."""
    configs = {id(config): config for part in module.modules() if (config := getattr(part, "config", None)) is not None}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for config in cached:
            config.use_cache = True
