"""SmolLM2-135M at half the bytes of its bf16 checkpoint, by a search: int8 alone does not get there, two methods do."""

from __future__ import annotations

import argparse
from pathlib import Path

import leanformers as lean
from claim import Evidence

GOALS = ("bytes<=0.5x", "quality>=0.97x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence-smollm2"))
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--finalists", type=int, default=0)
    parser.add_argument("--validation", type=int, default=48)
    given = parser.parse_args()
    with Evidence(
        "smollm2",
        claim="A search puts methods together that halve SmolLM2's bf16 checkpoint at 1.03x its bits per byte",
        paper="leanformers; vocabulary after idT5 (arXiv 2302.00856), int8 after LLM.int8() (arXiv 2208.07339)",
        seeds=(0,),
    ) as evidence:
        frontier = lean.slim(
            "smollm2",
            "docstrings-lm",
            goals=GOALS,
            out=given.folder,
            trials=given.trials,
            finalists=given.finalists,
            validation=given.validation,
            estimate=0 if not given.finalists else 128,
            batch_size=4,
            device="cpu",
        )
        small = [point for point in frontier.points if point.ratios["bytes"] <= 0.5]
        best = max(small or frontier.points, key=lambda point: point.ratios["quality"])
        before, after = frontier.baseline.measurement, best.measurement
        assert before is not None and after is not None and best.recipe is not None
        evidence.baseline = {"metrics": before.metrics, "bytes": before.bytes, "latency": before.latency}
        evidence.result = {
            "recipe": list(best.recipe.steps),
            "metrics": after.metrics,
            "ratios": best.ratios,
            "points": [{"name": point.name, "ratios": point.ratios} for point in frontier.points],
        }
        evidence.check("Bytes on disk, ratio to bf16", best.ratios["bytes"], "<= 0.5")
        bits = after.metrics["bits_per_byte"] / before.metrics["bits_per_byte"]
        evidence.check("Bits per byte, ratio", bits, "<= 1.03")


if __name__ == "__main__":
    main()
