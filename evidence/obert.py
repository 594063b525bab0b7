"""oBERT on a small ViT that reads digits: one-shot pruning, by second order against by magnitude, three seeds.

512 gradients of batches of 8; one inverse Fisher serves all levels of a model. Recomputations (of the first seed) and
the update of the weights that stay are tried at damp 1e-6. The zeros are of single weights, so nothing gets faster:
accuracy at equal sparsity is what counts. Above 70 % nothing is required; the table shows where each rule breaks.
Outside references, of which nothing is required: Wanda and pruning in the style of SparseGPT, which make a share of
*each* linear zero (wanda: of each row) where oBERT and magnitude spread the zeros over all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from claim import Evidence, arguments
from common import copied, mean, quality, treat
from digits import trained
from leanformers.methods import Subject
from leanformers.methods.compress.obert import Obert
from one_shot import RULES as REFERENCES
from one_shot import prune

SEEDS = (0, 1, 2)
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
RULES: dict[str, dict[str, Any]] = {
    "obert": {"damp": 1e-7},
    "obert, diagonal": {"damp": 1e-7, "block_size": 1},
    "obert, damp 1e-4": {"damp": 1e-4},
}
_made: dict[tuple[Any, ...], Any] = {}


@dataclass(frozen=True, kw_only=True)
class Shared(Obert):
    """The method itself; of one model the inverse is computed once."""

    model: int = 0

    def _inverses(self, subject: Subject, paths: Sequence[str], seed: int) -> Any:
        key = (self.model, self._block, self.damp, self.gradients, *paths)
        if key not in _made:
            _made.clear()
            _made[key] = super()._inverses(subject, paths, seed)
        return dict(_made[key])


def pruned(source: Subject, sparsity: float, **settings: Any) -> float:
    result = copied(source)
    Shared(sparsity=sparsity, model=source.seed, **{"gradients": 512, **settings})(result)
    return quality(result)


def referenced(source: Subject, rule: str, sparsity: float) -> float:
    result = copied(source)
    prune(result, rule, sparsity, 512)
    return quality(result)


given = arguments(__doc__, small=None).parse_args()
with Evidence(
    "obert",
    claim="One-shot pruning by second order, with the weights that stay moved, keeps far more accuracy than magnitude",
    paper="Kurtic et al. (EMNLP 2022), The Optimal BERT Surgeon, arXiv 2203.07259",
    seeds=SEEDS,
    folder=given.results,
) as evidence:
    dense: list[float] = []
    rules = ("magnitude", *REFERENCES, *RULES)
    table: dict[str, dict[float, list[float]]] = {rule: {level: [] for level in LEVELS} for rule in rules}
    still: dict[bool, list[float]] = {True: [], False: []}
    recomputed: dict[int, float] = {}
    for seed in SEEDS:
        source = trained(seed)
        dense.append(quality(source))
        for level in LEVELS:
            magnitude = {"method": "essential-sparsity", "sparsity": level}
            table["magnitude"][level].append(quality(treat(source, magnitude)))
            for rule in REFERENCES:
                table[rule][level].append(referenced(source, rule, level))
        for rule, settings in RULES.items():
            for level in LEVELS:
                table[rule][level].append(pruned(source, level, **settings))
        for moves, values in still.items():
            values.append(pruned(source, 0.6, damp=1e-6, compensate=moves))
        for rule, found in table.items():
            print(
                f"seed {seed}: {rule} { {level: round(values[-1], 3) for level, values in found.items()} }", flush=True
            )
        if seed == SEEDS[0]:
            for number in (1, 4, 8):
                step = {"method": "obert", "sparsity": 0.7, "damp": 1e-6, "gradients": 256, "recomputations": number}
                recomputed[number] = quality(treat(source, step))
            print(f"recomputations {recomputed}", flush=True)

    accuracy = {rule: {level: mean(values) for level, values in found.items()} for rule, found in table.items()}
    updated = {"with": mean(still[True]), "without": mean(still[False])}
    evidence.baseline = {"accuracy": mean(dense), "magnitude": accuracy["magnitude"]}
    evidence.result = {
        "accuracy_by_rule_and_sparsity": accuracy,
        "accuracy_by_seed": table,
        "recomputations_at_0.7": recomputed,
        "weights_moved_at_0.6": updated,
    }
    for level, least in ((0.5, 3), (0.6, 10), (0.7, 25)):
        gain = 100 * (accuracy["obert"][level] - accuracy["magnitude"][level])
        evidence.check(f"Over magnitude at {level:.0%}, points", gain, f">= {least}")
    evidence.check("8 recomputations over 1 at 70%, points", 100 * (recomputed[8] - recomputed[1]), ">= 0")
    gain = 100 * (updated["with"] - updated["without"])
    evidence.check("Weights that stay moved over left at 60%, points", gain, "> 0")
    if not evidence.holds:
        evidence.cause = (
            "transformers initialises a ViT narrowly (0.02), so that weights without use stay near zero and magnitude "
            "finds them: it is a stronger baseline here than on the card's own model. Tried beside this run: from a "
            "wider start (one seed) magnitude breaks earlier and the lead grows, though not to the margins required"
        )
