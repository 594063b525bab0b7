"""FLOPs per real token: on the task's own batches, so that what padding costs is in it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from leanformers.measure import cost
from leanformers.measure.batches import Batch, Measurable, RealBatches
from leanformers.runtimes import device_of, place

logger = logging.getLogger(__name__)

# Above this many FLOPs (an estimate) one row of each batch is counted and multiplied by the rows.
_COUNT_WHOLE = 2e11


def flops_per_token(model: Any, task: Measurable, real: RealBatches) -> float:
    """FLOPs of the task's forward per real (unpadded) token of the batches: what padding costs is in it.

    For a large model one row of each batch is counted, at its padded length, and multiplied by its rows.
    """
    estimate = 2 * cost.parameters(model) * sum(real.positions)
    total = 0
    for batch, rows in zip(real.batches, real.examples, strict=True):
        taken, times = (batch, 1) if estimate <= _COUNT_WHOLE else (_rows(batch, 1), rows)
        taken = place(taken, device_of(model))
        total += times * cost.count_flops(_forward(model, task, taken), model).total
    return total / max(1, sum(real.tokens))


def _forward(model: Any, task: Measurable, batch: Batch) -> Callable[[], Any]:
    was_training = model.training

    def call() -> Any:
        model.eval()
        try:
            return task.forward(model, batch)
        finally:
            model.train(was_training)

    return call


def _rows(batch: Batch, count: int) -> Batch:
    return {k: v[:count] if torch.is_tensor(v) and v.dim() else v for k, v in batch.items()}


def flops_without_task(model: Any, seed: int, length: int = 128) -> dict[str, Any]:
    """FLOPs per token of one unpadded sequence of random ids; nothing where the model takes no ids."""
    config = getattr(model, "config", None)
    vocab = getattr(config, "vocab_size", None)
    if vocab is None or getattr(config, "is_encoder_decoder", False):
        return {}
    positions = getattr(config, "max_position_embeddings", None)
    length = min(length, positions - 2) if isinstance(positions, int) and positions > 2 else length
    ids = torch.randint(0, vocab, (1, length), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}
    try:
        count = cost.count_flops(lambda: model(**batch), model).total
    except Exception as error:  # a model of another kind of input
        logger.info("FLOPs were not counted: %s", error)
        return {}
    return {"flops": count / length, "padding": 0.0, "examples": 1, "tokens": length}
