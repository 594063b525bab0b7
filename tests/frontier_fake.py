"""A search without models: methods that do nothing, and a workbench that answers from a formula.

Run as a script it searches in the folder that it is given, so that tests can kill it.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from leanformers import folders
from leanformers.frontier import Effort, Search, Space, parse_all
from leanformers.frontier.bench import RESULT, Result
from leanformers.frontier.goals import objectives
from leanformers.frontier.space import name_of, trained_prefix
from leanformers.methods import Choice, Range, get, method
from leanformers.recipe import key_of

GOALS = parse_all(["latency<=0.6x", "bytes<=0.3x", "quality>=0.98x"])


def register():
    """Five methods named fake-…; returns their infos."""

    @method("fake-words", stage="vocabulary")
    @dataclass(frozen=True, kw_only=True)
    class Words:
        keep: float = 0.3

        @classmethod
        def space(cls):
            return {"keep": Range(0.1, 1.0)}

    @method("fake-drop", stage="structure", order=0)
    @dataclass(frozen=True, kw_only=True)
    class Drop:
        keep: float = 0.5

        @classmethod
        def space(cls):
            return {"keep": Choice([0.34, 0.5, 0.67, 0.84])}

        @classmethod
        def starts(cls):
            return [{"keep": 0.5}, {"keep": 0.67}]

    @method("fake-rank", stage="structure", order=1)
    @dataclass(frozen=True, kw_only=True)
    class Rank:
        share: float = 0.5

        @classmethod
        def space(cls):
            return {"share": Range(0.1, 0.9)}

    @method("fake-teach", stage="recover", trains=True)
    @dataclass(frozen=True, kw_only=True)
    class Teach:
        hidden: float = 0.0

        @classmethod
        def space(cls):
            return {"hidden": Choice([0.0, 1.0])}

    @method("fake-int8", stage="quantise")
    @dataclass(frozen=True, kw_only=True)
    class Int8:
        table: bool = True

        @classmethod
        def space(cls):
            return {"table": Choice([False, True])}

    return [get(f"fake-{name}") for name in ("words", "drop", "rank", "teach", "int8")]


def outcome(steps, share):
    """(quality, latency, bytes) as ratios; `share` of the training was done."""
    by = {step["method"]: step for step in steps}
    lost, latency, table, body = 0.0, 1.0, 0.5, 0.5
    if words := by.get("fake-words"):
        table *= words["keep"]
        lost += 0.25 * max(0.0, 0.35 - words["keep"])
    gap = 0.0
    if drop := by.get("fake-drop"):
        body, latency = body * drop["keep"], 0.05 + 0.95 * drop["keep"]
        gap += 0.5 * (1 - drop["keep"]) ** 2
    if rank := by.get("fake-rank"):
        body, latency = body * (0.1 + rank["share"]), latency * (0.4 + 0.6 * rank["share"])
        gap += 0.4 * (1 - rank["share"]) ** 2
    if "fake-teach" in by:
        gap *= 1 - share * (0.87 if by["fake-teach"]["hidden"] else 0.85)
    if int8 := by.get("fake-int8"):
        body, lost = body * 0.26, lost + 0.002
        if int8["table"]:
            table, lost = table * 0.26, lost + 0.001
    return 1 - lost - gap, latency, table + body


class FakeBench:
    """Counts in `log.txt` what it is asked; `slow` seconds for each; `trouble` may raise."""

    def __init__(self, folder, infos, slow=0.0, trouble=None):
        self.folder, self.infos, self.slow, self.trouble = folder, infos, slow, trouble
        self.asked = []

    def _note(self, what, steps):
        self.asked.append((what, steps))
        with (self.folder / "log.txt").open("a") as log:
            log.write(json.dumps([what, steps]) + "\n")
        time.sleep(self.slow)
        if self.trouble:
            self.trouble(what, steps)

    def _result(self, steps, share):
        quality, latency, size = outcome(steps, share)
        ratios = {"quality": quality, "latency": latency, "bytes": size}
        measured = {"parameters": 10, "bytes": int(1e6 * size), "memory": 10, "quality": quality}
        trains = trained_prefix({info.slug: info for info in self.infos}, steps) > 0
        return Result(
            measurement={**measured, "latency": latency},
            ratios=ratios,
            seconds=0.1,
            train_seconds=0.1 * trains,
            trained_examples=100 * trains,
            full_examples=1000 * trains,
            tier="lean",
        )

    def estimate(self, steps):
        self._note("estimate", steps)
        return self._result(steps, 0.4)

    def full(self, steps):
        place = self.folder / "finals" / name_of(steps, key_of(steps))
        if (place / RESULT).is_file():
            return Result(**json.loads((place / RESULT).read_text()))
        self._note("full", steps)
        count = trained_prefix({info.slug: info for info in self.infos}, steps)
        if 0 < count < len(steps):
            self.full(steps[:count])
        with folders.whole(place) as partial:
            (partial / "model.safetensors").write_text("weights")
            folders.write_json(partial / "steps.json", steps)
            folders.write_json(partial / RESULT, self._result(steps, 1.0).to_json())
        return self._result(steps, 1.0)

    def compare(self, names):
        from leanformers.measure import Measurement

        found = {"baseline": Measurement(parameters=10, bytes=1_000_000, memory=10, quality=1.0, latency=1.0)}
        for name in names:
            steps = json.loads((self.folder / "finals" / name / "steps.json").read_text())
            found[name] = Measurement(**self._result(steps, 1.0).measurement)
        return found


def search_in(folder, infos, *, trials=20, finalists=3, seed=0, goals=GOALS, minutes=None, **options):
    """(search, its bench)."""
    folder.mkdir(parents=True, exist_ok=True)
    bench = FakeBench(folder, infos, **options)
    effort = Effort(trials=trials, finalists=finalists, minutes=minutes)
    return Search(folder, bench, Space(infos), goals, objectives(goals), effort, seed=seed), bench


if __name__ == "__main__":
    search, _ = search_in(Path(sys.argv[1]), register(), trials=int(sys.argv[2]), slow=float(sys.argv[3]))
    search.explore()
    search.confirm()
