"""What six methods add to a search: SmolLM2's frontier with and without them in the space, the same number of trials.

Both arms run lean.slim's own search over estimates (training cut to a few hundred docstrings), three seeds each, side
by side; what they have in common is estimated once. A search sees the validation rows; its frontier is then scored on
the test rows, by optuna's hypervolume up to a corner that is stated beforehand: quality, bytes and FLOPs as ratios to
the model as it is. Bytes are those of the tensors that a checkpoint stores. The six: SliceGPT, oBERT (whose zeros
save nothing, so that it can only be a burden here), FuseGPT, VTrans, DSFormer, AxFormer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from claim import RESULTS, Evidence
from common import device, mean

SIX = ("slicegpt", "obert", "fusegpt", "vtrans", "dsformer", "axformer")
OTHERS = ("idt5", "drop-layers", "optin", "greenformers", "distillation", "lora", "quantization")
ARMS = {"without": OTHERS, "with": (*OTHERS, *SIX)}
GOALS = ("bytes<=0.5x", "flops<=0.7x", "quality>=0.8x")
CORNER = {"quality": 0.65, "bytes": 1.1, "flops": 1.1}  # what the search itself works for under these goals
SEEDS = (0, 1, 2)
LENGTH, ATTEMPTS = 128, 4


def names(arm: str) -> tuple[str, ...]:
    """The arm's methods; int8 takes torchao, and where that is missing neither arm has it."""
    return tuple(n for n in ARMS[arm] if n != "quantization" or importlib.util.find_spec("torchao") is not None)


class Bench:
    """A search's workbench whose estimates are kept, one file a recipe, with the quality of the test rows beside."""

    def __init__(self, folder: Path, given: argparse.Namespace, deadline: float) -> None:
        from leanformers.frontier.bench import Workbench
        from leanformers.methods import Budget, methods
        from leanformers.recipe import Recipe, spec_of
        from leanformers.tasks import task

        class Noting(Workbench):
            def quick(self) -> dict[str, Any]:
                return {**super().quick(), "latency": False}  # it is no objective, and several searches run at once

            def _measured(self, subject: Any, *place: Any) -> Any:
                found = super()._measured(subject, *place)
                self.on_test = subject.evaluate("test", given.test)
                return found

        torch.set_float32_matmul_precision("high")  # the baseline's too
        for name in ("locks", "table"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        the_task = task("docstrings-lm", size=given.rows, max_length=LENGTH)
        self.folder, self.deadline = folder, deadline
        self.inner = Noting(
            folder,
            given.model,
            the_task,
            methods(),
            recipe=Recipe(model=given.model, task=spec_of(the_task), dtype="float32", seed=0),
            budget=Budget(examples=given.examples),
            validation=given.validation,
            test=given.test,
            batch_size=4,
            runtime="torch",
            device=device(),
            progress=False,
        )
        self.test = float(self.inner.baseline().quality)

    def estimate(self, steps: Any) -> Any:
        """A search ends, as by Ctrl-C, where the time is over."""
        from filelock import FileLock

        from leanformers import folders
        from leanformers.frontier.bench import Result
        from leanformers.recipe import key_of

        path = self.folder / "table" / f"{key_of(steps)}.json"
        with FileLock(self.folder / "locks" / f"estimate-{path.stem}.lock"):
            if not path.is_file():
                if time.time() > self.deadline:
                    raise KeyboardInterrupt
                found = self._patiently(steps)
                task = self.inner.task
                own = task.quality(self.inner.on_test)
                ratio = own / self.test if task.better == "higher" else self.test / own
                folders.write_json(path, {"result": found.to_json(), "test": ratio})
        return Result(**json.loads(path.read_text())["result"])

    def _patiently(self, steps: Any) -> Any:
        """The estimate; where the searches beside this one have the GPU's memory, once more a little later."""
        for _ in range(ATTEMPTS - 1):
            try:
                return self.inner.estimate(steps)
            except torch.OutOfMemoryError:
                print("no memory at present", flush=True)
            time.sleep(10)
        return self.inner.estimate(steps)

    def tested(self, steps: Any) -> float:
        """Quality on the test rows, as a ratio that is above 1 where it is better."""
        from leanformers.recipe import key_of

        return float(json.loads((self.folder / "table" / f"{key_of(steps)}.json").read_text())["test"])


def part(folder: Path, arm: str, seed: int, given: argparse.Namespace) -> None:
    """One search; its recipes in the order of their trials, to folder/<arm>-<seed>.json."""
    from optuna.storages import InMemoryStorage

    from leanformers import folders
    from leanformers.frontier.goals import objectives, parse_all
    from leanformers.frontier.search import Effort, Search
    from leanformers.frontier.slim import suited
    from leanformers.frontier.space import Space
    from leanformers.frontier.store import Store
    from leanformers.methods import get

    # One process a search: its trials need no database.
    setattr(Store, "_storage", lambda self: InMemoryStorage())  # noqa: B010
    own = Bench(folder, given, given.deadline)
    infos, _ = suited({name: get(name) for name in names(arm)}, own.inner.subject, own.inner.venue, explicit=True)
    goals = parse_all(GOALS, own.inner.task.better)
    search = Search(
        folder / f"{arm}-{seed}",
        own,  # type: ignore[arg-type]
        Space(list(infos.values())),
        goals,
        objectives(goals),
        Effort(trials=given.trials),
        seed=seed,
        say=lambda text: print(text, flush=True),
    )
    starts = search.starts()  # the same for every seed
    share = seed * len(starts) // len(SEEDS)
    for steps in [*starts[share:], *starts[:share]]:  # so the searches of an arm divide them, and do not queue
        with suppress(Exception, KeyboardInterrupt):  # what is wrong is told when it is a trial
            own.estimate(steps)
    try:
        search.explore()
    except KeyboardInterrupt:
        print("the time is over", flush=True)
    rows = []
    for record in search.store.records():
        row: dict[str, Any] = {"steps": record.steps, "state": record.state, "reason": record.reason}
        if record.result is not None:
            row["ratios"] = {name: record.result["ratios"][name] for name in CORNER}
            row["test"] = own.tested(record.steps)
            row["seconds"] = record.result["seconds"]
        rows.append(row)
    folders.write_json(folder / f"{arm}-{seed}.json", rows)


def run(folder: Path, given: argparse.Namespace) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """All searches, side by side, each in a process of its own."""
    Bench(folder, given, given.deadline)  # the baseline
    threads = str(max(1, (os.cpu_count() or 1) // given.workers))

    def one(what: tuple[str, int]) -> None:
        if (folder / f"{what[0]}-{what[1]}.json").is_file():
            return
        command = [sys.executable, __file__, *sys.argv[1:], "--deadline", str(given.deadline)]
        command += ["--part", what[0], str(what[1])]
        with (folder / f"{what[0]}-{what[1]}.log").open("w") as log:
            subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": threads}, check=True, stdout=log, stderr=log)

    parts = [(arm, seed) for seed in SEEDS[: given.seeds] for arm in ARMS]
    with ThreadPoolExecutor(given.workers) as pool:
        list(pool.map(one, parts))
    return {(arm, seed): json.loads((folder / f"{arm}-{seed}.json").read_text()) for arm, seed in parts}


# ------------------------------------------------------------------------------------------------- the score
def vectors(rows: Sequence[Mapping[str, Any]], split: str, costs: Sequence[str]) -> list[tuple[float, ...]]:
    """What is minimised: the negated ratio of quality, and the costs."""
    return [
        (-(row["test"] if split == "test" else row["ratios"]["quality"]), *(row["ratios"][cost] for cost in costs))
        for row in rows
    ]


def frontier(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The recipes that no other beats on the validation rows."""
    from leanformers.frontier.pareto import non_dominated

    return [rows[i] for i in non_dominated(vectors(rows, "validation", ("bytes", "flops")))]


def hypervolume(rows: Sequence[Mapping[str, Any]], split: str, costs: Sequence[str]) -> float:
    """Of the frontier and the model as it is, by optuna; the library's own agrees."""
    import numpy as np
    from optuna._hypervolume import compute_hypervolume

    from leanformers.frontier import pareto

    corner = (-CORNER["quality"], *(CORNER[cost] for cost in costs))
    points = [(-1.0, *(1.0 for _ in costs)), *vectors(frontier(rows), split, costs)]
    points = [point for point in points if all(x < r for x, r in zip(point, corner, strict=True))]
    found = float(compute_hypervolume(np.array(points), np.array(corner)))
    assert abs(found - pareto.hypervolume(points, corner)) < 1e-9
    return found


def uses_six(row: Mapping[str, Any]) -> bool:
    return any(step["method"] in SIX for step in row["steps"])


def told(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"steps": row["steps"], "test": row["test"], **row["ratios"]}


def judged(
    evidence: Evidence, found: Mapping[tuple[str, int], list[dict[str, Any]]], given: argparse.Namespace
) -> None:
    seeds = sorted({seed for _, seed in found})
    trials = min(len([row for row in rows if row["state"] in ("done", "failed")]) for rows in found.values())
    cut = {key: [r for r in rows if r["state"] in ("done", "failed")][:trials] for key, rows in found.items()}
    done = {key: [row for row in rows if row["state"] == "done"] for key, rows in cut.items()}
    volumes: dict[str, Any] = {}
    for split in ("test", "validation"):
        for costs in (("bytes", "flops"), ("bytes",), ("flops",)):
            volumes[f"{split}: quality, {', '.join(costs)}"] = {
                arm: [hypervolume(done[arm, seed], split, costs) for seed in seeds] for arm in ARMS
            }
    joint = {seed: frontier([*done["with", seed], *done["without", seed]]) for seed in seeds}
    evidence.baseline = {
        "arm": "without",
        "methods": names("without"),
        "hypervolume": {name: both["without"] for name, both in volumes.items()},
        "frontier": {seed: [told(row) for row in frontier(done["without", seed])] for seed in seeds},
    }
    evidence.result = {
        "arm": "with",
        "methods": names("with"),
        "trials": trials,
        "tokens": LENGTH,
        "examples of an estimate": given.examples,
        "corner": CORNER,
        "hypervolume": {name: both["with"] for name, both in volumes.items()},
        "frontier": {seed: [told(row) for row in frontier(done["with", seed])] for seed in seeds},
        "points that use the six, on the frontier of both arms": {
            seed: [sum(map(uses_six, rows)), len(rows)] for seed, rows in joint.items()
        },
        "trials that used each of the six": {
            slug: sum(step["method"] == slug for seed in seeds for row in cut["with", seed] for step in row["steps"])
            for slug in SIX
        },
        "failed": {f"{arm} {seed}": sum(r["state"] == "failed" for r in rows) for (arm, seed), rows in cut.items()},
        "why": sorted({str(r["reason"]) for rows in cut.values() for r in rows if r["state"] == "failed"}),
    }
    for name, both in volumes.items():
        print(name, {arm: [round(value, 4) for value in values] for arm, values in both.items()}, flush=True)
    both = volumes["test: quality, bytes, flops"]
    ratios = [a / b for a, b in zip(both["with"], both["without"], strict=True)]
    evidence.result["ratios by seed"] = ratios
    evidence.check("Trials of each search", trials, ">= 16")
    evidence.check("Hypervolume on the test rows, with over without, mean of seeds", mean(ratios), "> 1")
    share = mean(sum(map(uses_six, rows)) / max(len(rows), 1) for rows in joint.values())
    evidence.check("Share of the frontier of both arms that uses one of the six, mean of seeds", share, "> 0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence-frontier-gains"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no estimate is begun")
    parser.add_argument("--rows", type=int, default=2_000, help="docstrings of the task")
    parser.add_argument("--examples", type=int, default=384, help="of them that an estimate trains on")
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--model", default="smollm2", help="another one for a trial of this script")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.deadline = given.deadline or time.time() + 60 * given.minutes
    if given.part:
        part(given.folder, given.part[0], int(given.part[1]), given)
        return
    with Evidence(
        "frontier-gains",
        claim="With the six compress methods in its space the search's frontier of SmolLM2 gains points",
        paper="leanformers; hypervolume as in Zitzler and Thiele (1999), by optuna; the cards of the six methods",
        seeds=SEEDS[: given.seeds],
        folder=given.results,
    ) as evidence:
        found = run(given.folder, given)
        judged(evidence, found, given)


if __name__ == "__main__":
    main()
