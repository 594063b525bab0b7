"""An embedder made lean by the search itself: all-MiniLM-L6-v2 on *docstrings-search*, no labels used.

The whole of `leanformers slim`, its default space; what counts is the best point that meets the latency goal, and
how much of the old index's quality its queries keep.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import leanformers as lean
from claim import Evidence

GOALS = ("latency<=0.6x", "quality>=0.97x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence-embedder"))
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--finalists", type=int, default=2)
    given = parser.parse_args()
    with Evidence(
        "embedder",
        claim="A search with a teacher and no labels finds an embedder at 0.6x the latency that keeps its nDCG@10",
        paper="leanformers; distillation after Hinton et al. (2015), arXiv 1503.02531",
        seeds=(0,),
    ) as evidence:
        frontier = lean.slim(
            "minilm",
            "docstrings-search",
            goals=GOALS,
            out=given.folder,
            trials=given.trials,
            finalists=given.finalists,
            device="cpu",
        )
        fast = [point for point in frontier.points if point.ratios["latency"] <= 0.6]
        best = max(fast or frontier.points, key=lambda point: point.ratios["quality"])
        before, after = frontier.baseline.measurement, best.measurement
        assert before is not None and after is not None and best.recipe is not None
        evidence.baseline = {"metrics": before.metrics, "latency": before.latency, "bytes": before.bytes}
        evidence.baseline |= {r.name: r.measurement.metrics for r in frontier.references if r.measurement}
        evidence.result = {
            "recipe": list(best.recipe.steps),
            "metrics": after.metrics,
            "ratios": best.ratios,
            "points": [{"name": point.name, "ratios": point.ratios} for point in frontier.points],
        }
        evidence.check("Latency, ratio", best.ratios["latency"], "<= 0.6")
        evidence.check("nDCG@10, ratio", best.ratios["quality"], ">= 0.97")
        share = after.metrics["old_index_ndcg@10"] / before.metrics["ndcg@10"]
        evidence.check("nDCG@10 of its queries on the old index, share", share, ">= 0.9")


if __name__ == "__main__":
    main()
