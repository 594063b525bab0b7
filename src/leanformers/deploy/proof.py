"""The proof of an export: the folder is opened in a fresh process and answers as its source did.

The inputs are rows of the task: the shortest alone, the longest alone, and mixed ones, padded. In floats the source
is the model itself; a quantised export has to answer in the fresh process as it did where it was written, and how
much it lost shows in its quality on the task.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from leanformers.deploy import child
from leanformers.deploy.targets import Target
from leanformers.errors import LeanError
from leanformers.runtimes.calling import Call, call_of

ROWS = 24  # of the task, from which the cases are taken
AGREEMENT = 0.98  # of greedy tokens, where weights were rounded to f16


class ProofError(LeanError):
    """An export that does not answer as its source."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the fresh process found. difference: the largest of all cases, as a share of the outputs' scale."""

    cases: int
    difference: float
    agreement: float


def batches(task: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Batches of several sizes and lengths, from the task's test rows.

    Raises:
        LeanError: the task has no test rows.
    """
    rows = sorted(task.features(tokenizer, "test", ROWS), key=lambda row: len(next(iter(row.values()))))
    if not rows:
        raise LeanError(f"task {task.name} has no test rows, on which an export is proved")
    groups = [rows[:1], rows[-1:], rows[len(rows) // 2 :][:3], [rows[0], *rows[-3:], rows[len(rows) // 3]]]
    return [task.collate(tokenizer, group) for group in groups]


def prove(target: Target, folder: Path, model: Any, tokenizer: Any, task: Any, *, quantised: bool) -> Proof:
    """Compare the folder, opened in a fresh process, with its source.

    Raises:
        ProofError: they differ, or the folder cannot be opened there; the first difference is named.
    """
    calls = [call_of(task, model, batch) for batch in batches(task, tokenizer)]
    tolerance = 1e-3 if quantised else target.tolerance
    expected: Callable[[Call], torch.Tensor] = _of_folder(target, folder) if quantised else _of_model
    tensors: dict[str, torch.Tensor] = {}
    for number, call in enumerate(calls):
        tensors |= {f"{number}.input.{name}": value.contiguous() for name, value in call.tensors.items()}
        tensors[f"{number}.output"] = expected(call).detach().cpu().contiguous()
    found = _in_fresh_process(target, folder, tensors)
    shares = [case["difference"] / max(case["scale"], 1e-12) for case in found]
    for call, case, share in zip(calls, found, shares, strict=True):
        rounded = tolerance > 1e-3  # then the greedy tokens have to agree besides
        if not share <= tolerance or (rounded and case["agreement"] < AGREEMENT):
            shape = list(next(iter(call.tensors.values())).shape)
            raise ProofError(
                f"the export to {target.name} does not answer as its source: on inputs of shape {shape} outputs "
                f"differ by {case['difference']:.3g} on a scale of {case['scale']:.3g} (at most {tolerance:g} of it is "
                f"allowed), and {case['agreement']:.1%} of the largest outputs agree. Nothing was kept"
            )
    return Proof(cases=len(found), difference=max(shares), agreement=min(case["agreement"] for case in found))


def _of_model(call: Call) -> torch.Tensor:
    from leanformers.runtimes.quantising import unrounded

    # int8_dynamic rounds the inputs of its linears, which no export does.
    with unrounded(call.module), torch.inference_mode():
        return child.first(call.module(**call.kwargs))


def _of_folder(target: Target, folder: Path) -> Callable[[Call], torch.Tensor]:
    run = child.opened(target.name, folder)

    def outputs(call: Call) -> torch.Tensor:
        with torch.inference_mode():
            return child.first(run(call.tensors))

    return outputs


def _in_fresh_process(target: Target, folder: Path, tensors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "expected.safetensors"
        save_file(tensors, path)
        command = [sys.executable, child.__file__, target.name, str(folder), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ProofError(f"the export to {target.name} cannot be opened in a fresh process: {said}. Nothing was kept")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
