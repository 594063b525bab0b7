"""Greenformers, part A: MiniLM's linears factorised at half their break-even rank, then fine-tuned on *sentiment*."""

from __future__ import annotations

from typing import Any

from claim import Evidence
from common import mean, quality, subject, treat

SEEDS = (0, 1, 2)
TUNE = {"method": "fine-tune", "epochs": 2.0}
SOLVERS = ("svd", "snmf", "random")


def low_rank(solver: str) -> dict[str, Any]:
    return {"method": "greenformers", "rank": 0.5, "solver": solver, "multiple": 1}


with Evidence(
    "greenformers",
    claim="Linears factorised at half the break-even rank keep the quality after fine-tuning, started from the SVD",
    paper="Cahyawijaya (2021), Greenformers, arXiv 2108.10808",
    seeds=SEEDS,
) as evidence:
    untuned: dict[str, list[float]] = {solver: [] for solver in SOLVERS}
    tuned: dict[str, list[float]] = {name: [] for name in ("dense", *SOLVERS)}
    parameters = {}
    for seed in SEEDS:
        base = subject("minilm", "sentiment", seed=seed)
        dense = treat(base, TUNE)
        tuned["dense"].append(quality(dense))
        parameters["dense"] = dense.anatomy.parameters()
        for solver in SOLVERS if seed == SEEDS[0] else ("svd", "random"):  # semi-NMF is slow: one seed
            untuned[solver].append(quality(treat(dense, low_rank(solver))))
            lean = treat(base, low_rank(solver), TUNE)
            tuned[solver].append(quality(lean))
            parameters[solver] = lean.anatomy.parameters()
    accuracy = {name: mean(values) for name, values in tuned.items()}
    before = {name: mean(values) for name, values in untuned.items()}
    evidence.baseline = {"accuracy": accuracy["dense"], "parameters": parameters["dense"]}
    evidence.result = {
        "accuracy_tuned": accuracy,
        "accuracy_factorised_after_tuning_not_retrained": before,
        "parameters": parameters,
    }
    evidence.check("SVD over random start, tuned, points", 100 * (accuracy["svd"] - accuracy["random"]), ">= 0")
    evidence.check("SVD, share of the dense accuracy", accuracy["svd"] / accuracy["dense"], ">= 0.98")
    evidence.check("SVD over random, not retrained, points", 100 * (before["svd"] - before["random"]), "> 0")
    linears = (parameters["dense"] - parameters["svd"]) / 10.6e6
    evidence.check("Share of the linears' weights that is gone", linears, ">= 0.45")
    if not evidence.holds:
        evidence.cause = (
            "half the break-even rank halves every linear of a small model, and two epochs on labels regain too little"
        )
