"""`export`: write a model for a runtime, prove that the folder answers as its source, measure it, rename it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanformers import folders
from leanformers.deploy.proof import Proof, prove
from leanformers.deploy.targets import target
from leanformers.errors import LeanError
from leanformers.execute import load_model, task_of
from leanformers.runtimes import Prepared
from leanformers.surgery import ledger
from leanformers.surgery.edit import lost_by_export
from leanformers.tasks.loading import warn_of_new_head

if TYPE_CHECKING:
    from leanformers.measure import Measurement

SECONDS = 4.0  # of timing


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export that was proved. ratios: to the source in eager torch, timed in the same rounds."""

    folder: Path
    target: str
    quantize: str | None
    proof: Proof
    measurement: Measurement | None = None
    source: Measurement | None = None

    @property
    def ratios(self) -> dict[str, float]:
        if self.measurement is None or self.source is None:
            return {}
        return self.measurement.ratios(self.source)


def export(
    model: Any,
    to: str,
    out: str | Path,
    *,
    task: Any = None,
    tokenizer: Any = None,
    quantize: str | None = None,
    max_drop: float | None = None,
    measure: bool = True,
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write a model for a runtime; the folder appears under its name once it is proved.

    Args:
        model: a loaded model (with `tokenizer`), a pair, a folder or a name; lean or not.
        to: "onnx", "openvino", "gguf" (llama.cpp), "torch" (an AOTInductor package) or "stock" (a checkpoint that
            transformers loads alone).
        out: a folder that does not exist yet.
        task: real inputs to prove the export on and rows to measure it with; None takes the task of the recipe
            that lies beside the model.
        quantize: onnx: "int8" (ranges at run time); openvino: "int8"; gguf: "q8_0", "q6_k",
            "q5_k_m", "q4_k_m", or "f32" and "bf16" instead of f16.
        max_drop: with openvino's "int8": the share of the source's quality that may be lost on the validation rows,
            such as 0.01; operations that cost more stay in floats, and finding them takes a while.
        measure: quality, latency and bytes, beside the source's. limit: test rows of the quality, None for all.

    Raises:
        LeanError: bad input, or a part that cannot be exported, before anything is written.
        ProofError: the export does not answer as its source; nothing is kept.
    """
    wanted = target(to)
    form = wanted.check(quantize, max_drop)
    folder = Path(out)
    folders.check_output(folder, lambda _: False, "an empty place for an export")
    the_task = task_of(task) if task is not None else _task_beside(model)
    loaded, own = load_model(model, the_task, tokenizer, "float32", trust_remote_code=trust_remote_code)
    if isinstance(model, str | Path):
        warn_of_new_head(loaded, model)
    loaded = _exportable(loaded)
    with folders.whole(folder) as partial:
        if max_drop is not None and wanted.within is not None:
            wanted.within(loaded, own, the_task, partial, max_drop)
        else:
            wanted.write(loaded, own, the_task, partial, form)
        proof = prove(wanted, partial, loaded, own, the_task, quantised=quantize is not None)
        measured = source = None
        if measure:
            from leanformers.measure import compare

            prepared = wanted.prepare(partial, loaded, the_task, quantize)
            places = {"export": partial} | ({"source": Path(model)} if _is_folder(model) else {})
            both = compare(
                {"source": (loaded, own), "export": (prepared, own)},
                the_task,
                folders=places,
                limit=limit,
                seconds=SECONDS,
            )
            measured, source = both["export"], both["source"]
        _record(partial, wanted.name, quantize, max_drop, proof, measured)
    return Exported(
        folder=folder, target=wanted.name, quantize=quantize, proof=proof, measurement=measured, source=source
    )


def draft(model: Any, tokenizer: Any, task: Any, to: str, folder: Path, *, quantize: str | None = None) -> Prepared:
    """The model as it would run exported, from a folder that nobody is to deploy: it is not proved.

    Args:
        folder: an empty one, which is needed as long as the result is.
        The rest is as in `export`.

    Raises:
        LeanError: bad input, or a part that cannot be exported.
    """
    wanted = target(to)
    wanted.write(_exportable(model), tokenizer, task, folder, wanted.check(quantize))
    return wanted.prepare(folder, model, task, quantize)


def _exportable(model: Any) -> Any:
    """The model on the CPU, where exports are made; the caller's stays where it is.

    Raises:
        LeanError: it holds an edit that an exported model would no longer do.
    """
    if model.device.type != "cpu":
        model = copy.deepcopy(model).to("cpu")
    model.eval()
    if lost := lost_by_export(edit.type for edit in ledger(model)):
        raise LeanError(f"{lost} Export the model that it was made of.")
    return model


def _record(folder: Path, name: str, quantize: str | None, max_drop: float | None, proof: Proof, measured: Any) -> None:
    """Write what was proved and measured beside the model."""
    from leanformers.measure import environment

    record = {
        "target": name,
        "quantize": quantize,
        "max_drop": max_drop,
        "proof": {"cases": proof.cases, "difference": proof.difference, "agreement": proof.agreement},
        "measurement": measured.to_json() if measured is not None else None,
        **environment(),
    }
    folders.write_json(folder / "leanformers.json", record)


def _task_beside(model: Any) -> Any:
    """The task of the recipe in the model's folder.

    Raises:
        LeanError: there is none.
    """
    from leanformers.recipe import Recipe

    path = Path(model) / "recipe.yaml" if _is_folder(model) else None
    found = task_of(Recipe.load(path).task) if path is not None and path.is_file() else None
    if found is None:
        why = ""
        if isinstance(model, str | Path):
            why = f", and {model} holds no recipe with a task" if _is_folder(model) else f", and {model} is no folder"
        raise LeanError(
            f"an export is proved on real inputs{why}: say what the model is for with task= (--task NAME, or "
            "--data FILE)"
        )
    return found


def _is_folder(model: Any) -> bool:
    return isinstance(model, str | Path) and Path(model).is_dir()
