"""How fast a causal language model writes: new tokens per second of `generate`, without the prefill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from leanformers.measure.batches import Batch
from leanformers.measure.latency import Candidate, time_together


def decode_rates(
    models: Mapping[str, tuple[Any, Batch]],
    *,
    new_tokens: int = 32,
    seconds: float = 6.0,
    min_rounds: int = 3,
) -> dict[str, float]:
    """New tokens per second of each model on its batch: greedy, with the cache, `new_tokens` for every row.

    Each model is timed at 1 and at `new_tokens` new tokens, all interleaved; the difference is what decoding
    takes. Rows must have no padding (`unpadded` cuts a batch down), since prompts would have to be padded on
    the left.
    """
    if new_tokens < 2:
        raise ValueError("new_tokens must be at least 2")
    candidates = {}
    for name, (model, batch) in models.items():
        prompt = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
        for count in (1, new_tokens):
            candidates[f"{count} {name}"] = Candidate(call=_writer(model, count), batches=[prompt], device=model.device)
    timings = time_together(candidates, seconds=seconds, min_rounds=min_rounds, warmup=1)
    rates = {}
    for name, (_, batch) in models.items():
        taken = timings[f"{new_tokens} {name}"].latency - timings[f"1 {name}"].latency
        rates[name] = batch["input_ids"].shape[0] * (new_tokens - 1) / max(taken, 1e-9)
    return rates


def unpadded(batch: Batch, rows: int = 1) -> Batch:
    """Ids and mask of the first `rows` rows of a right-padded batch, cut to the shortest of them."""
    mask = batch["attention_mask"][:rows]
    length = int(mask.sum(1).min())
    return {"input_ids": batch["input_ids"][:rows, :length], "attention_mask": mask[:, :length]}


def _writer(model: Any, count: int) -> Any:
    def write(prompt: Batch) -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(
                **prompt,
                do_sample=False,
                num_beams=1,
                min_new_tokens=count,
                max_new_tokens=count,
                use_cache=True,
                pad_token_id=0,
            )

    return write
