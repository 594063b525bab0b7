"""Essential sparsity: how many weights of a pre-trained model can be zeroed by magnitude before quality breaks.

(a) SmolLM2-135M as it is, held-out docstrings; (b) all-MiniLM-L6-v2, pruned once and fine-tuned with the mask fixed on
4,000 sentences of *sentiment*, three seeds. Left out: the iterative (lottery ticket) variant and the training trace.
"""

from __future__ import annotations

from typing import Any

from claim import Evidence
from common import mean, perplexity, quality, subject, treat
from leanformers.tasks import task

SEEDS = (0, 1, 2)
TOKENS = 48  # held-out rows scored
SENTENCES = 4_000
LEVELS = (0.0, 0.3, 0.5, 0.7, 0.9)
TUNE = {"method": "fine-tune", "epochs": 2.0}


def prune(**settings: Any) -> dict[str, Any]:
    return {"method": "essential-sparsity", **settings}


def knee(levels: list[float], values: list[float]) -> float:
    """The level at which the curve bends most: the largest second difference."""
    bends = [values[i - 1] - 2 * values[i] + values[i + 1] for i in range(1, len(values) - 1)]
    return levels[1 + max(range(len(bends)), key=lambda i: abs(bends[i]))]


with Evidence(
    "essential-sparsity",
    claim="One-shot magnitude pruning of a pre-trained model costs little up to a turning point, then breaks; "
    "random masks break at once",
    paper="Jaiswal, Liu, Chen, Wang (NeurIPS 2023), The Emergence of Essential Sparsity, arXiv 2306.03805",
    seeds=SEEDS,
) as evidence:
    language = subject("smollm2", "docstrings-lm", dtype="float32")

    def after(*steps: dict[str, Any]) -> float:
        return perplexity(treat(language, *steps), TOKENS)

    dense = after()
    curve = {level: after(prune(sparsity=level)) / dense for level in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)}
    layer = {level: after(prune(sparsity=level, scope="layer")) / dense for level in (0.2, 0.4, 0.5)}
    groups = {pattern: after(prune(pattern=pattern)) / dense for pattern in ("1:2", "2:4", "4:8")}
    random = after(prune(sparsity=0.1, scores="random")) / dense
    essential = max(level for level, ratio in {0.0: 1.0, **curve}.items() if ratio <= 1.1)

    sentences = task("sentiment", size=SENTENCES)
    tuned: dict[float, list[float]] = {level: [] for level in LEVELS}
    chance: dict[float, list[float]] = {level: [] for level in (0.7,)}
    for seed in SEEDS:
        base = subject("minilm", sentences, seed=seed)
        for level in LEVELS:
            tuned[level].append(quality(treat(base, prune(sparsity=level), TUNE)))
        for level in chance:
            chance[level].append(quality(treat(base, prune(sparsity=level, scores="random"), TUNE)))
    accuracy = {level: mean(values) for level, values in tuned.items()}
    bend = knee(list(LEVELS), list(accuracy.values()))

    evidence.baseline = {"perplexity": dense, "accuracy": accuracy[0.0]}
    evidence.result = {
        "perplexity_ratio_global": curve,
        "perplexity_ratio_per_layer": layer,
        "perplexity_ratio_n_m": groups,
        "perplexity_ratio_random_at_0.1": random,
        "essential_sparsity_smollm2_without_tuning": essential,
        "accuracy_tuned": accuracy,
        "accuracy_tuned_random_mask": {level: mean(values) for level, values in chance.items()},
        "knee_minilm_tuned": bend,
    }
    evidence.check("SmolLM2: perplexity ratio at 20 %, magnitude", curve[0.2], "<= 1.1")
    evidence.check("SmolLM2: random at 10 % over magnitude at 40 %", random / curve[0.4], "> 1")
    order = [groups["4:8"], groups["2:4"], groups["1:2"]]
    evidence.check("SmolLM2: N:M ratios 4:8, 2:4, 1:2", order, lambda v: v[0] < v[1] < v[2], "rising")
    evidence.check("SmolLM2: the curve breaks after 20 %, by 30 %", curve[0.3] / curve[0.2], "> 1.1")
    evidence.check("MiniLM tuned: accuracy lost at 30 %, points", 100 * (accuracy[0.0] - accuracy[0.3]), "<= 1")
    lost = 100 * (accuracy[0.7] - mean(chance[0.7]))
    evidence.check("MiniLM tuned: random mask behind magnitude at 70 %, points", lost, ">= 2")
