"""Training that diverged, told apart from bad input."""

from __future__ import annotations

from leanformers.errors import LeanError


class TrainingDiverged(LeanError, FloatingPointError):
    """The loss or a weight became NaN or infinite; a search records the trial as failed and goes on."""
