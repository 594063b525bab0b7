"""OPTIN on a fine-tuned MiniLM (*sentiment*) and on MiniLM as an embedder: no retraining.

Neurons are scored in groups of four. Trajectory scores against KL alone, the product of weight norms, and random
choice, at equal multiply-adds. The card's small vision experiment is not repeated; for the embedder 1 - cosine
stands in for the KL term.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from claim import Evidence
from common import copied, mean, quality, subject, treat
from leanformers.methods import Subject
from leanformers.methods.compress.optin import Optin, Scorer, _real, balanced, select
from leanformers.surgery import KeepHeads, KeepNeurons

SETTINGS = Optin(samples=64, rows=512, neuron_group=4)
BUDGETS = (0.8, 0.6, 0.5, 0.4)


def cut(source: Subject, scores: dict[Any, float], budget: float, length: float) -> Subject:
    """A copy with the best units under the budget."""
    result = copied(source)
    for index, (heads, neurons) in enumerate(select(result.anatomy, scores, budget, length)):
        layer = result.anatomy.layers[index]
        if len(heads) < layer.attention.num_key_value_heads:
            result.apply(KeepHeads(path=layer.attention.path, size=len(heads)), keep=torch.tensor(heads))
        if len(neurons) < layer.feed_forward.intermediate_size:
            edit = KeepNeurons(path=layer.feed_forward.path, size=len(neurons))
            result.apply(edit, keep=torch.tensor(neurons))
    return result


def rankings(source: Subject) -> tuple[dict[str, dict[Any, float]], float]:
    """Scores of every unit by each rule, and the mean length of the batch."""
    batch = next(source.calibration(SETTINGS.samples, batch_size=SETTINGS.samples))
    length = float(_real(batch).sum()) / len(_real(batch))
    manifold, logits = Scorer(source, batch, SETTINGS).terms()
    trajectory = balanced(manifold, logits, SETTINGS.balance)
    return {
        "trajectory": trajectory,
        "KL only": logits,
        "weight norms": {unit: norms(source, unit) for unit in trajectory},
        "random": {unit: random.Random(f"{unit}").random() for unit in trajectory},
    }, length


def norms(source: Subject, unit: Any) -> float:
    """Product of the norms of a unit's incoming and outgoing weights."""
    index, kind, members = unit
    layer = source.anatomy.layers[index]
    if kind == "neuron":
        part = layer.feed_forward
        rows, columns = torch.tensor(members), part.down.weight()[:, list(members)]
        return float(part.up.weight()[rows].norm() * columns.norm())
    attention = layer.attention
    rows = torch.arange(members[0] * attention.head_dim, (members[0] + 1) * attention.head_dim)
    return float(attention.value.weight()[rows].norm() * attention.output.weight()[:, rows].norm())


with Evidence(
    "optin",
    claim="One-shot structured pruning by trajectories keeps more quality than weight norms at equal multiply-adds",
    paper="Khaki, Plataniotis (ICLR 2024), The Need for Speed, arXiv 2403.17921",
) as evidence:
    tuned = treat(subject("minilm", "sentiment"), {"method": "fine-tune", "epochs": 2.0})
    dense = quality(tuned)
    scores, length = rankings(tuned)
    table = {
        name: {budget: quality(cut(tuned, ranking, budget, length)) for budget in BUDGETS}
        for name, ranking in scores.items()
    }

    embedder = subject("minilm", "docstrings-search")
    rows = embedder.task.calibration(embedder.tokenizer, 256, batch_size=64)
    batches = [{k: v.to(embedder.model.device) for k, v in batch.items()} for batch in rows]

    def embed(source: Subject) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([source.task.forward(source.model, batch) for batch in batches])

    whole = embed(embedder)
    ranked, mean_length = rankings(embedder)
    cosines = {
        name: torch.cosine_similarity(embed(cut(embedder, ranked[name], 0.6, mean_length)), whole).mean().item()
        for name in ("trajectory", "weight norms", "random")
    }

    evidence.baseline = {"accuracy": dense}
    evidence.result = {"accuracy_by_rule_and_budget": table, "embedder_cosine_at_0.6": cosines}
    kept = table["trajectory"][0.6] / dense
    evidence.check("Accuracy kept at 60 % of the multiply-adds, not retrained", kept, ">= 0.9")
    ahead = 100 * (table["trajectory"][0.5] - table["weight norms"][0.5])
    evidence.check("Trajectory over weight norms at 50 %, points", ahead, ">= 5")
    over = 100 * (table["trajectory"][0.4] - table["KL only"][0.4])
    evidence.check("Trajectory over KL only at 40 %, points", over, "> 0")
    gain = cosines["trajectory"] - cosines["weight norms"]
    evidence.check("Embedder: cosine to the dense embedding over weight norms' at 60 %", gain, "> 0")
    evidence.check(
        "Mean over budgets, trajectory over random, points",
        100 * (mean(table["trajectory"].values()) - mean(table["random"].values())),
        "> 0",
    )
