"""Which edit of which family runs in which runtime: every combination, on tiny random models on the CPU.

A case is a tiny model of a family with one edit (and the model as it is), exported for a runtime and run on batches of
several sizes. Either its outputs are PyTorch's, or it is refused in a sentence. `torch.export` is the graph that the
runtime torch-aot compiles; llama.cpp gets float32 files and keeps its cache in float32. Linears of the scheme
int8_dynamic are compared without the rounding of their inputs, which no export does.

    python evidence/exports.py                  all cases that runs/exports/ does not hold yet, then the result
    python evidence/exports.py --only-missing   the same, beginning with the cases of the last result
    python evidence/exports.py --family bert    the cases of one family alone, and no result
    python evidence/exports.py --write          no case, the result of those that runs/exports/ holds
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from claim import RESULTS, Evidence

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / place) for place in ("", "surgery", "runtimes")]  # models and edits

PLAIN = "as it is"
BROKEN = "it breaks instead of being refused: "
RUNTIMES = ("torch.export", "onnxruntime", "openvino", "llama.cpp")  # in the order of the result
SEEDS = 3  # of the place where an edit is made, until one is found that it fits
Cases = dict[str, dict[str, float | str | None]]
"""runtime -> edit -> the largest distance of its outputs, the sentence that refuses it, or None: no place for it."""


def shared(name: str) -> Any:
    """A module that the tests share."""
    return importlib.import_module(name)


# -- one family --------------------------------------------------------------------------------------------------


def kinds() -> tuple[str, ...]:
    """The model as it is, and every edit that can be exported, as the tests draw it.

    Raises:
        SystemExit: the registry of edits has one that they do not draw.
    """
    from leanformers.surgery.edit import edit_types, exportable_types

    drawn = shared("drawing").KINDS
    if unknown := [name for name in edit_types() if not any(kind.startswith(name) for kind in drawn)]:
        raise SystemExit(f"tests/surgery/drawing.py draws no {', '.join(unknown)}: add it to KINDS and draw")
    return (PLAIN, *(kind for kind in drawn if edit_of(kind) in exportable_types()))


def edit_of(kind: str) -> str:
    """The type of the edit that is drawn under a name: keep_heads, and mask_weights for mask_weights_2_4."""
    from leanformers.surgery.edit import edit_types

    return max((name for name in edit_types() if kind.startswith(name)), key=len)


def families() -> tuple[str, ...]:
    return tuple(shared("families").FAMILIES_TINY)


def edited(make: Callable[[], Any], kind: str) -> Any:
    """A model with the edit; None where the family has no place for it."""
    from leanformers.errors import LeanError
    from leanformers.surgery import apply

    for seed in range(SEEDS):
        model = make()
        if kind == PLAIN:
            return model
        drawn = shared("drawing").draw(model, kind, seed=seed)
        if drawn is None:
            return None
        try:
            return apply(model, drawn[0], **drawn[1]).eval()
        except LeanError:
            continue
    return None


def through(runtime: str, model: Any) -> float:
    """The largest distance of the model's outputs in a runtime to PyTorch's, as a share of the largest of them."""
    from leanformers.runtimes import prepare
    from leanformers.runtimes.calling import StandIn, call_of
    from leanformers.runtimes.exported import trace

    if runtime == "llama.cpp":
        return in_llama_cpp(model)
    models = shared("lean_models")
    task = models.Forward()
    if runtime != "torch.export":
        return models.farthest(prepare(model, task, runtime), model)
    graph = trace(call_of(task, model, models.batch(model, 2, 7, True)), "dynamo").to("cpu").runners["model"]

    def run(one: dict[str, Any]) -> Any:
        return task.forward(StandIn(graph, frozenset(one), model.config, model.device), one)

    return models.farthest(run, model)


def in_llama_cpp(model: Any) -> float:
    from leanformers.runtimes.gguf import write_gguf
    from leanformers.runtimes.llama_cpp import Session

    families, models = shared("families"), shared("lean_models")
    with tempfile.TemporaryDirectory() as folder:
        session = Session(write_gguf(model, None, Path(folder, "model.gguf"), dtype="f32"), exact=True)
        found = 0.0
        for length in (23, 1, 5):
            batch = families.inputs(model, batch=1, length=length)
            logits = session.logits(batch["input_ids"][0].tolist())
            found = max(found, models.distance(logits, families.outputs(model, batch)[0]))
        session.close()
    return found


def makers(family: str) -> dict[str, Callable[[], Any]]:
    """runtime -> what makes the family's tiny model, for the runtimes that claim the family and are here."""
    from leanformers.runtimes import available
    from leanformers.runtimes.gguf.graph import FAMILIES

    tiny = shared("families").FAMILIES_TINY[family]
    here = {"torch.export": tiny}
    here |= {name: tiny for name in ("onnxruntime", "openvino") if name in available()}
    if "llama.cpp" in available() and family in FAMILIES:
        here["llama.cpp"] = lambda: shared("gguf_making").tiny(family)
    return here


def case(runtime: str, make: Callable[[], Any], kind: str) -> float | str | None:
    from leanformers.errors import LeanError
    from leanformers.runtimes.quantising import unrounded

    model = edited(make, kind)
    if model is None:
        return None
    try:
        with unrounded(model):
            return float(f"{through(runtime, model):.1e}")
    except LeanError as refusal:
        return str(refusal)
    except Exception as error:  # recorded, so that the other cases are run, and counted as a failure
        return f"{BROKEN}{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def one_family(family: str, path: Path) -> None:
    """Run the cases that `path` does not hold, writing each as it is done."""
    warnings.simplefilter("ignore")
    done: Cases = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for runtime, make in makers(family).items():
        for kind in kinds():
            if kind in done.setdefault(runtime, {}):
                continue
            start = time.perf_counter()
            done[runtime][kind] = case(runtime, make, kind)
            path.write_text(json.dumps(done, indent=1), "utf-8")
            print(f"{family} {runtime} {kind}: {done[runtime][kind]} ({time.perf_counter() - start:.1f} s)", flush=True)


# -- all of them -------------------------------------------------------------------------------------------------


def measured(table: dict[str, Cases]) -> Iterator[tuple[str, float | str]]:
    """What was tried: "family, runtime, edit" and what came of it."""
    for runtime, rows in table.items():
        for family, cells in rows.items():
            for kind, value in cells.items():
                if value is not None:
                    yield f"{family}, {runtime}, {kind}", value


def write(folder: Path) -> None:
    """The result of all cases in the folder."""
    with Evidence(
        "exports",
        claim="An edited model answers in another runtime as it does in PyTorch, or the export says why it cannot",
        paper="leanformers; runtimes: torch.export, ONNX Runtime, OpenVINO, llama.cpp",
        seeds=(0,),
    ) as evidence:
        order = kinds()
        table: dict[str, Any] = {runtime: {} for runtime in RUNTIMES}
        untried = []
        for family in families():
            path = folder / f"{family}.json"
            if not path.is_file():
                untried.append(family)
                continue
            for runtime, cells in json.loads(path.read_text("utf-8")).items():
                table[runtime][family] = {kind: cells[kind] for kind in order if kind in cells}
        table = {runtime: rows for runtime, rows in table.items() if rows}
        tried = dict(measured(table))
        distances = {name: value for name, value in tried.items() if not isinstance(value, str)}
        wrong = sorted(name for name, value in distances.items() if not value <= 1e-3)
        broken = sorted(name for name, value in tried.items() if isinstance(value, str) and value.startswith(BROKEN))
        evidence.result = {
            "distances": table,
            "edits": {kind: edit_of(kind) for kind in order if kind != PLAIN},
            "cases": len(tried),
            "exact": len(distances) - len(wrong),
            "refused": len(tried) - len(distances),
            "untried": untried,
            "wrong": wrong,
            "broken": broken,
        }
        evidence.check(
            "Cases that run and answer otherwise, by more than 1e-3 of the outputs' scale", len(wrong), "== 0"
        )
        evidence.check("Cases that break instead of being refused", len(broken), "== 0")
        evidence.check("Largest distance of the cases that run", max(distances.values()), "<= 1e-3")
        plain = [name for name, value in tried.items() if name.endswith(PLAIN) and isinstance(value, str)]
        evidence.check("Families that a runtime claims and refuses as they are", len(plain), "== 0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="only this one (repeatable), and no result")
    parser.add_argument("--only-missing", action="store_true", help="keep the cases of the last result")
    parser.add_argument("--write", action="store_true", help="only write the result of the cases that are there")
    parser.add_argument("--workers", type=int, default=1, help="families side by side")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "exports", help="where cases are kept")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.here:
        one_family(given.here, given.folder / f"{given.here}.json")
        return
    if given.write:
        write(given.folder)
        return
    last = RESULTS / "exports.json"
    if given.only_missing and last.is_file():
        kept: dict[str, Cases] = json.loads(last.read_text("utf-8"))["result"]["distances"]
        for family in families():
            cells = {runtime: rows[family] for runtime, rows in kept.items() if family in rows}
            path = given.folder / f"{family}.json"
            if cells and not path.is_file():
                path.write_text(json.dumps(cells), "utf-8")

    def apart(family: str) -> None:  # a process each, since traced graphs stay in memory
        command = [sys.executable, __file__, "--here", family, "--folder", str(given.folder)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    with ThreadPoolExecutor(given.workers) as pool:
        list(pool.map(apart, given.family or families()))
    if not given.family:
        write(given.folder)


if __name__ == "__main__":
    main()
