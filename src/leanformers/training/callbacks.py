"""What methods may do between the steps of a training: masks, gates, schedules."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Callback(Protocol):
    """Called after each optimiser step, with the model that is trained.

    step counts from 1 to total over the whole training. After a resume it goes on from the last checkpoint,
    so a callback that depends on (step, total) and the model's own tensors alone needs no state.
    """

    def after_step(self, model: Any, step: int, total: int) -> None: ...


def progress_of(step: int, total: int, start: float = 0.0, end: float = 1.0) -> float:
    """How far a schedule over the share start..end of a training is: 0 before, 1 after, linear between."""
    if end <= start:
        return 1.0 if step >= end * total else 0.0
    return min(1.0, max(0.0, (step / max(total, 1) - start) / (end - start)))


def cubic(step: int, total: int, first: float, last: float, start: float = 0.0, end: float = 1.0) -> float:
    """Zhu and Gupta's (2017) cubic schedule from `first` to `last`: fast first, slow near the end."""
    return last + (first - last) * (1 - progress_of(step, total, start, end)) ** 3
