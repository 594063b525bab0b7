"""oBERT on SmolLM2-135M-Instruct: one shot to half of its block weights, against global magnitude.

Nothing is trained. The Fisher is that of the causal loss on training docstrings; held-out ones are scored. Its inverse
for 106 M weights in blocks of 50 takes 21 GB, so this is for a GPU; --small is a dry run with few gradients. Outside
references, of which nothing is required: Wanda and pruning in the style of SparseGPT, which make half of *each* linear
zero (wanda: of each row) where oBERT and magnitude spread the zeros over all, and which look at a block's inputs alone.
"""

from __future__ import annotations

from typing import Any

from claim import Evidence, arguments
from common import copied, perplexity, subject, treat
from leanformers.methods import Subject
from one_shot import RULES, prune

SPARSITY = 0.5
ROWS = 48  # held-out, scored
TEXTS = 512  # that the references calibrate on


def main() -> None:
    given = arguments(__doc__).parse_args()
    small = {"gradients": 2, "gradient_batch": 1, "block_size": 2, "memory": 0.3}
    few: dict[str, Any] = small if given.small else {}
    with Evidence(
        "obert-smollm2",
        claim="Half the block weights of a language model go in one shot at a lower perplexity than by magnitude",
        paper="Kurtic et al. (EMNLP 2022), The Optimal BERT Surgeon, arXiv 2203.07259",
        folder=given.results,
    ) as evidence:
        source = subject("smollm2", "docstrings-lm", dtype="float32")

        def scored(name: str, treated: Subject) -> float:
            found = perplexity(treated, 4 if given.small else ROWS)
            print(f"{name}: {found:.2f}", treated.notes, flush=True)
            return found

        def after(name: str, *steps: dict[str, Any]) -> float:
            return scored(name, treat(source, *steps))

        def reference(rule: str) -> float:
            other = copied(source)
            prune(other, rule, SPARSITY, 8 if given.small else TEXTS)
            return scored(rule, other)

        dense = after("dense")
        magnitude = after("magnitude", {"method": "essential-sparsity", "sparsity": SPARSITY})
        references = {rule: reference(rule) for rule in RULES}
        step = {"method": "obert", "sparsity": SPARSITY, **few}
        table = {"obert": after("obert", step)}
        if not given.small:
            few = {"gradients": 256}
            table["diagonal Fisher, 256 gradients"] = after("diagonal", {**step, **few, "block_size": 1})
            table["damp 1e-6, 256 gradients"] = after("damp 1e-6", {**step, **few, "damp": 1e-6})
            parts = {"gradients": 128, "recomputations": 4}
            table["4 recomputations, 128 gradients each"] = after("recomputed", {**step, **parts})
        evidence.baseline = {"perplexity": dense, "perplexity_magnitude": magnitude}
        evidence.result = {"perplexity": table, "perplexity_of_references": references}
        evidence.check("Perplexity at 50%, ratio to magnitude's", table["obert"] / magnitude, "< 1")


if __name__ == "__main__":
    main()
