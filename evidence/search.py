"""The search is worth it: on the demo's model and task, 20 trials of the search against 40 random recipes.

Both draw from the same space and are scored by the same estimates (training cut to 256 sentences, 400 validation
rows, latency in turns with the baseline); a recipe is estimated once and kept in a table, so that the arms share
what they have in common. The score is the hypervolume that the search itself works for: quality with the share that
full training is taken to regain, latency and bytes, all as ratios. The parts run side by side: `--workers`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from claim import Evidence
from common import mean

SEEDS = (0, 1, 2)
TRIALS, RANDOM, PARTS = 20, 40, 2
GOALS = ("latency<=0.6x", "bytes<=0.3x", "quality>=0.98x")
ROWS, EXAMPLES, VALIDATION, TEST = 4_000, 256, 400, 1_000


def bench(folder: Path) -> Any:
    """The demo's workbench, its baseline made or read back."""
    from leanformers.frontier.bench import Workbench
    from leanformers.methods import Budget, methods
    from leanformers.recipe import Recipe, spec_of
    from leanformers.tasks import task

    (folder / "locks").mkdir(parents=True, exist_ok=True)
    the_task = task("sentiment", size=ROWS)
    made = Workbench(
        folder,
        "minilm",
        the_task,
        methods(),
        recipe=Recipe(model="minilm", task=spec_of(the_task), dtype="auto", seed=0),
        budget=Budget(examples=EXAMPLES),
        validation=VALIDATION,
        test=TEST,
        batch_size=16,
        runtime="torch",
        device="cpu",
        progress=False,
    )
    made.baseline()
    return made


class Table:
    """A workbench whose estimates are kept, one file a recipe."""

    def __init__(self, inner: Any, folder: Path) -> None:
        self.inner, self.folder = inner, folder
        folder.mkdir(parents=True, exist_ok=True)

    def estimate(self, steps: Any) -> Any:
        from leanformers import folders
        from leanformers.frontier.bench import Result
        from leanformers.recipe import key_of

        path = self.folder / f"{key_of(steps)}.json"
        if not path.is_file():
            found = self.inner.estimate(steps)
            folders.write_json(path, found.to_json())
        return Result(**json.loads(path.read_text()))


def part(folder: Path, kind: str, seed: int, share: int) -> None:
    """One arm's recipes with their scores, to folder/<kind>-<seed>-<share>.json."""
    import optuna

    from leanformers import folders
    from leanformers.frontier.goals import objectives, parse_all, relative
    from leanformers.frontier.search import Effort, Search
    from leanformers.frontier.select import REGAINED, reference_of, vector
    from leanformers.frontier.slim import suited
    from leanformers.frontier.space import Space
    from leanformers.methods import methods
    from leanformers.recipe import key_of

    own = bench(folder)
    infos, _ = suited(methods(), own.subject, own.venue, explicit=False)
    space = Space(list(infos.values()))
    goals = [relative(goal, own.baseline().quality, own.task.better) for goal in parse_all(GOALS, own.task.better)]
    table = Table(own, folder / "table")
    place = folder / f"{kind}-{seed}-{share}"
    effort = Effort(trials=TRIALS)
    search = Search(place, table, space, goals, objectives(goals), effort, seed=seed, say=print)  # type: ignore[arg-type]
    if kind == "random":
        count = RANDOM // PARTS
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1_000 * (seed + 1)))
        drawn: dict[str, Any] = {}
        while len(drawn) < RANDOM:
            steps = space.suggest(study.ask())
            if steps:
                drawn.setdefault(key_of(steps), steps)
        search.effort = Effort(trials=count)
        search.store.enqueue(list(drawn.values())[share * count : (share + 1) * count])
    search.explore()
    candidates = search.candidates()
    vectors = [vector(candidate, search.objectives, REGAINED) for candidate in candidates]
    failed = sum(record.state == "failed" for record in search.store.records())
    corner = reference_of(goals, search.objectives)
    folders.write_json(
        folder / f"{kind}-{seed}-{share}.json",
        {"corner": corner, "vectors": vectors, "failed": failed, "steps": [c.steps for c in candidates]},
    )


def run(folder: Path, workers: int) -> dict[str, Any]:
    """All parts, side by side, each in a process of its own; their files' contents by name."""
    bench(folder)
    parts = [("search", seed, 0) for seed in SEEDS]
    parts += [("random", seed, share) for seed in SEEDS for share in range(PARTS)]
    threads = str(max(1, (os.cpu_count() or 1) // workers))

    def one(what: tuple[str, int, int]) -> None:
        name = "-".join(map(str, what))
        if not (folder / f"{name}.json").is_file():
            command = [sys.executable, __file__, "--folder", str(folder), "--part", *map(str, what)]
            with (folder / f"{name}.log").open("w") as log:
                subprocess.run(
                    command, env={**os.environ, "OMP_NUM_THREADS": threads}, check=True, stdout=log, stderr=log
                )

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, parts))
    return {"-".join(map(str, p)): json.loads((folder / f"{'-'.join(map(str, p))}.json").read_text()) for p in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence-search"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        part(given.folder, given.part[0], int(given.part[1]), int(given.part[2]))
        return
    from leanformers.frontier.pareto import hypervolume

    with Evidence(
        "search",
        claim="20 trials of the search give at least the hypervolume of 40 random recipes of the same space",
        paper="leanformers; hypervolume as in Zitzler and Thiele (1999)",
        seeds=SEEDS,
    ) as evidence:
        found = run(given.folder, given.workers)
        searched, drawn, ratios = [], [], []
        for seed in SEEDS:
            first = found[f"search-{seed}-0"]
            others = [vector for i in range(PARTS) for vector in found[f"random-{seed}-{i}"]["vectors"]]
            searched.append(hypervolume(first["vectors"], first["corner"]))
            drawn.append(hypervolume(others, first["corner"]))
            ratios.append(searched[-1] / drawn[-1])
        evidence.baseline = {"recipes": RANDOM, "hypervolume": drawn}
        evidence.result = {
            "trials": TRIALS,
            "hypervolume": searched,
            "ratio": ratios,
            "failed": {name: part["failed"] for name, part in found.items()},
            "corner": found["search-0-0"]["corner"],
            "recipes_estimated": len(list((given.folder / "table").glob("*.json"))),
        }
        evidence.check("Hypervolume, 20 trials over 40 random recipes, mean of seeds", mean(ratios), ">= 1")
        evidence.check("Hypervolume ratio, the worst seed", min(ratios), ">= 1")


if __name__ == "__main__":
    main()
