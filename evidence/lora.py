"""LoRA on MiniLM, *sentiment*: tuned adapters, merged, against full fine-tuning at each one's own learning rate."""

from __future__ import annotations

from claim import Evidence
from common import mean, quality, subject, treat
from leanformers.surgery import tier

SEEDS = (0, 1, 2)
RATES = (5e-4, 1e-3, 2e-3)

with Evidence(
    "lora",
    claim="Low-rank adapters on query and value come within two points of full tuning, and merge into a stock model",
    paper="Hu et al. (2021), LoRA, arXiv 2106.09685",
    seeds=SEEDS,
) as evidence:
    full: list[float] = []
    lora: dict[float, list[float]] = {rate: [] for rate in RATES}
    share = 0.0
    tiers = []
    for seed in SEEDS:
        base = subject("minilm", "sentiment", seed=seed)
        full.append(quality(treat(base, {"method": "fine-tune", "epochs": 2.0})))
        for rate in RATES:
            tuned = treat(base, {"method": "lora", "rank": 8, "epochs": 2.0, "learning_rate": rate})
            lora[rate].append(quality(tuned))
            share = tuned.notes["trainable"] / base.anatomy.parameters()
            tiers.append(tier(tuned.model))
    best = max(RATES, key=lambda rate: mean(lora[rate]))
    evidence.baseline = {"accuracy": mean(full)}
    evidence.result = {
        "accuracy_by_rate": {str(rate): mean(values) for rate, values in lora.items()},
        "learning_rate": best,
        "trainable_share": share,
    }
    evidence.check("Points behind full tuning", 100 * (mean(full) - mean(lora[best])), "<= 2")
    evidence.check("Trainable share of the parameters", share, "<= 0.01")
    evidence.check("What loads the merged model", tiers, lambda found: set(found) == {"stock"}, "stock, always")
