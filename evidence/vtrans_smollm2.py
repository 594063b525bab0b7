"""VTrans on SmolLM2-135M-Instruct: a fifth of its layers' parameters goes, learnt from 4,000 docstrings.

Gates alone first (Faster-VTrans), then weights and gates on the same data; nothing is tuned afterwards, and held-out
docstrings are scored. Against units chosen by the size of their weights and by chance at the same parameters, each
with the residual width among the units and without, and the better counts. For a GPU; --small is a dry run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from claim import Evidence, arguments
from common import copied, perplexity, subject
from leanformers.methods.compress.vtrans import VTrans
from leanformers.tasks import task
from vtrans import PAPER, baselines, layer_parameters

ROWS = 4_000  # training docstrings, in chunks of up to 256 tokens
TARGET = 0.2


def main() -> None:
    given = arguments(__doc__).parse_args()
    options: dict[str, Any] = {"size": 16, "max_length": 64} if given.small else {"size": ROWS}
    held_out = 4 if given.small else None
    with Evidence(
        "vtrans-smollm2",
        claim="Trained gates find a fifth of a language model's layers that can go, at a lower perplexity than by "
        "magnitude or chance, and lower still when the weights train along; gates alone take less time per step",
        paper=PAPER,
        folder=given.results,
    ) as evidence:
        source = subject("smollm2", task("docstrings-lm", **options), dtype="float32")
        examples = len(source.task.features(source.tokenizer, "train"))
        tokens = sum(len(one["input_ids"]) for one in source.task.features(source.tokenizer, "train"))
        print(f"{examples} chunks, {tokens} tokens", flush=True)

        score = partial(perplexity, limit=held_out)
        dense = score(source)
        print(f"dense: {dense:.2f}", flush=True)
        others = baselines(source, TARGET, 0, score)
        print(json.dumps(others), flush=True)
        faster = VTrans(target=TARGET, variant="faster")
        found: dict[str, Any] = {}
        for name, method in (("faster", faster), ("vtrans", replace(faster, variant="vtrans"))):
            lean = copied(source)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            method(lean)
            found[name] = {
                "perplexity": score(lean),
                "seconds_per_step": lean.trained_seconds / -(-examples // method.batch_size),
                "layer_parameters": layer_parameters(lean) / layer_parameters(source),
                **lean.notes["vtrans"],
            }
            if torch.cuda.is_available():
                found[name]["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
            print(name, json.dumps(found[name]), flush=True)
        ours, tuned = found["faster"], found["vtrans"]
        evidence.baseline = {"perplexity": dense, "perplexity_by_rule": others}
        evidence.result = {**found, "chunks": examples, "tokens": tokens}
        stays = max(one["layer_parameters"] for one in found.values())
        evidence.check("Share of the layers' parameters that stays, larger", stays, f"<= {1 - TARGET}")
        for rule in ("random", "magnitude"):
            best = min(value for name, value in others.items() if name.startswith(rule))
            evidence.check(f"Gates alone: perplexity, ratio to {rule}", ours["perplexity"] / best, "< 1")
        ratio = tuned["perplexity"] / ours["perplexity"]
        evidence.check("Weights and gates: perplexity, ratio to gates alone", ratio, "< 1")
        time = ours["seconds_per_step"] / tuned["seconds_per_step"]
        evidence.check("Gates alone: seconds per step, ratio to weights and gates", time, "< 1")


if __name__ == "__main__":
    main()
