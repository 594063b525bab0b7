"""int8 in OpenVINO that costs no more quality than is allowed: what costs most stays in floats.

Where plain int8 is good enough on the task's validation rows, it is kept. Else NNCF quantises anew and takes back one
group of operations after the other, the worst first, until the task's own metric is near enough to the source's. That
takes runs over validation rows for every group of operations.
"""

from __future__ import annotations

from typing import Any

import torch

from leanformers.errors import LeanError
from leanformers.runtimes.base import Batch, prepare
from leanformers.runtimes.calling import StandIn, call_of
from leanformers.runtimes.exported import export_model
from leanformers.runtimes.hushing import hushed
from leanformers.runtimes.quantising import floats
from leanformers.runtimes.running import options

ROWS = 512  # of the validation split
RANKED_BY = 4  # batches of it, on which NNCF compares what each operation costs


def export_within(model: Any, task: Any, tokenizer: Any, *, calibration: list[Batch], max_drop: float) -> Any:
    """Export to OpenVINO, in int8 as far as the quality allows.

    Args:
        model: on the CPU. task: with validation rows. tokenizer: the model's.
        calibration: training rows as batches, from which the ranges of activations come.
        max_drop: of quality, as a share of the model's on the same rows.

    Returns:
        transformers' `ExportedModel`. If nothing but floats is good enough, it holds floats.

    Raises:
        LeanError: as `export_model`, `max_drop` is not between 0 and 1, or the task has no validation rows.
    """
    check_drop(max_drop)
    source, batches = prepare(model, task), []

    def remembered(batch: Batch) -> torch.Tensor:
        batches.append(batch)
        return source(batch)

    wanted = _quality(task, remembered, tokenizer)
    exported = export_model(model, task, "openvino", calibration=calibration, quantize="int8")
    runner = exported.to("cpu", **options("openvino")).runners["model"]
    names = frozenset(call_of(task, model, batches[0]).tensors)

    def ratio(run: Any) -> float:
        stand_in = StandIn(run, names, getattr(model, "config", None), torch.device("cpu"))
        return task.ratio(_quality(task, lambda batch: task.forward(stand_in, batch), tokenizer), wanted)

    if ratio(runner) >= 1 - max_drop:
        return exported
    with floats(model):
        exported = export_model(model, task, "openvino", calibration=calibration[:1])
    component = exported.components["model"]
    trained, seen = ([call_of(task, model, batch).tensors for batch in given] for given in (calibration, batches))
    component.program = _restored(component, ratio, trained, seen, max_drop)
    return exported


def _restored(component: Any, ratio: Any, calibration: list[Any], validation: list[Any], max_drop: float) -> Any:
    """The component's program in int8, but for the operations that NNCF takes back."""
    import nncf  # type: ignore[import-untyped]
    from transformers.exporters.auto import get_runner_class
    from transformers.exporters.utils import openvino_feed

    def feeds(given: list[dict[str, torch.Tensor]]) -> Any:
        return nncf.Dataset([openvino_feed(component.program, tensors) for tensors in given])

    def validate(compiled: Any, items: Any) -> tuple[float, list[list[Any]]]:
        """The quality, and the graph's outputs by batch, by which NNCF ranks operations."""
        kind: Any = get_runner_class("openvino")
        runner, outputs = kind(compiled, component.metadata), []

        def run(**tensors: torch.Tensor) -> Any:
            found = runner(**tensors)
            outputs.append([tensor.numpy() for tensor in torch.utils._pytree.tree_leaves(found)])
            return found

        return ratio(run), outputs

    with hushed(), torch.no_grad():
        return nncf.quantize_with_accuracy_control(
            component.program,
            feeds(calibration),
            feeds(validation),
            validate,
            max_drop=max_drop,
            drop_type=nncf.DropType.ABSOLUTE,  # of a ratio
            subset_size=len(calibration),
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                ranking_subset_size=RANKED_BY, num_ranking_workers=1
            ),
            # Smoothing moves scales from activations into weights. Where NNCF takes int8 back it puts the weights back
            # and leaves the scales, which is wrong.
            advanced_quantization_parameters=nncf.AdvancedQuantizationParameters(
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1)
            ),
        )


def check_drop(max_drop: float) -> None:
    """Refuse what is no share of a quality.

    Raises:
        LeanError: it is not between 0 and 1.
    """
    if not 0 < max_drop < 1:
        raise LeanError(f"max_drop is a share of the source's quality between 0 and 1, such as 0.01, not {max_drop}")


def _quality(task: Any, predict: Any, tokenizer: Any) -> float:
    return task.quality(task.evaluate(predict, tokenizer, "validation", ROWS))
