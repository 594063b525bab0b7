"""What methods may add to a training: something between its steps, a term of its loss; schedules for both."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Callback(Protocol):
    """Called after each optimiser step, with the model that is trained.

    step counts from 1 to total over the whole training. After a resume it goes on from the last checkpoint,
    so a callback that depends on (step, total) and the model's own tensors alone needs no state.
    """

    def after_step(self, model: Any, step: int, total: int) -> None: ...


class Penalty(nn.Module):
    """A term that a training adds to its loss, with parameters of its own: gates, scores, multipliers.

    Its parameters train beside the model's and are never saved with it; its buffers travel in the checkpoints, so
    that a schedule kept in a buffer goes on after a resume. It is a callback as well, called before the others.
    """

    def forward(self) -> Tensor:
        """Scalar, in the loss's unit, added once to each optimiser step. The model has run by then."""
        raise NotImplementedError

    def groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups: {"params": parameters, "lr": peak, "weight_decay": …, "maximize": whether it is
        gradient ascent}. What it leaves out takes the training's own settings."""
        return []

    def after_step(self, model: Any, step: int, total: int) -> None:
        """As a callback's."""


def progress_of(step: int, total: int, start: float = 0.0, end: float = 1.0) -> float:
    """How far a schedule over the share start..end of a training is: 0 before, 1 after, linear between."""
    if end <= start:
        return 1.0 if step >= end * total else 0.0
    return min(1.0, max(0.0, (step / max(total, 1) - start) / (end - start)))


def cubic(step: int, total: int, first: float, last: float, start: float = 0.0, end: float = 1.0) -> float:
    """Zhu and Gupta's (2017) cubic schedule from `first` to `last`: fast first, slow near the end."""
    return last + (first - last) * (1 - progress_of(step, total, start, end)) ** 3
