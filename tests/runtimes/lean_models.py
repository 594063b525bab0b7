"""What the tests of exported runtimes share: a task over the tiny models, lean models, and how far outputs are apart."""

from __future__ import annotations

from typing import Any

import torch
from drawing import KINDS, draw

from families import TINY, inputs
from leanformers.errors import LeanError
from leanformers.surgery import apply

TOLERANCE = 1e-5  # of the largest output, in float32; 1e-3 is what is promised
OTHERS = ((3, 11, True), (1, 5, False), (5, 2, False), (1, 1, False))  # rows, length, padded: unlike what is traced


class Forward:
    """A task for any model: all inputs in, logits (or the last hidden state) out."""

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        found = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        return found.logits if getattr(found, "logits", None) is not None else found.last_hidden_state


def lean(family: str, kinds: tuple[str, ...] = KINDS, head: str | None = None) -> tuple[Any, list[str]]:
    """A tiny model with one edit of each kind that finds a place in it, and those kinds."""
    model, made = TINY[family](head=head), []
    for number, kind in enumerate(kinds):
        drawn = draw(model, kind, seed=number)
        try:
            if drawn is not None:
                apply(model, drawn[0], **drawn[1])
                made.append(kind)
        except LeanError:  # an edit before it has taken the place
            continue
    return model.eval(), made


def batch(model: Any, rows: int, length: int, padded: bool) -> dict[str, torch.Tensor]:
    """Inputs of a size, with an attention mask wherever the model's padded inputs have one."""
    if model.config.model_type == "wav2vec2":
        length = max(length, 2)  # frames: torch.export has its convolutions take more than one
    masked = "attention_mask" in inputs(model, 2, 6, padded=True)
    made = inputs(model, rows, length, seed=rows + length, padded=padded and masked)
    if masked and "attention_mask" not in made:
        made["attention_mask"] = torch.ones_like(next(iter(made.values())), dtype=torch.int64)
    return made


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, over the largest output."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def farthest(prepared: Any, model: Any) -> float:
    """Largest distance to the model over batches of several sizes; the first one shapes the graph."""
    task, found = Forward(), 0.0
    for size in ((2, 7, True), *OTHERS):
        one = batch(model, *size)
        with torch.no_grad():
            found = max(found, distance(prepared(one), task.forward(model, one)))
    return found
