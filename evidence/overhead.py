"""What the attention dispatcher and an empty ledger cost a model that has no edits: forward time, interleaved.

all-MiniLM-L6-v2 on *sentiment* at batch sizes 1 and 16, and SmolLM2-135M on *docstrings-lm* at 1; stock SDPA is the
baseline, and stock beside stock says how far the clock is to be trusted.
"""

from __future__ import annotations

import copy
from typing import Any

from claim import Evidence
from common import subject
from leanformers.measure import compare
from leanformers.parts.attention import NAME, register
from leanformers.surgery.lean_config import ensure_ledger

SECONDS = 30.0
CASES = (("minilm", "sentiment", 1), ("minilm", "sentiment", 16), ("smollm2", "docstrings-lm", 1))


def lean(model: Any) -> Any:
    """The same model under the dispatcher and with an empty ledger."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(register())
    ensure_ledger(model)
    assert model.config._attn_implementation == NAME
    return model


with Evidence(
    "overhead",
    claim="The attention dispatcher and the ledger cost an unedited model at most 2 % of its forward time",
    paper="leanformers",
    seeds=(0,),
) as evidence:
    found: dict[str, dict[str, float]] = {}
    for name, task, batch_size in CASES:
        stock = subject(name, task, dtype="float32")
        models = {"stock": stock.model, "stock again": copy.deepcopy(stock.model), "lean": lean(stock.model)}
        timed = compare(
            {key: (model, stock.tokenizer) for key, model in models.items()},
            stock.task,
            quality=False,
            batch_size=batch_size,
            seconds=SECONDS,
        )
        case = f"{name}, batch {batch_size}"
        found[case] = {key: float(measured.latency_ratio or 0) for key, measured in timed.items()}
        evidence.baseline[case] = {"seconds per batch": timed["stock"].latency}
        evidence.check(f"Forward time over stock, {case}", found[case]["lean"], "<= 1.02")
    evidence.result = {"ratio to stock": found}
