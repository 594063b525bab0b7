"""Model soups: several trainings from one start, and the average of their weights.

Source: Wortsman et al. (2022, arXiv 2203.05482), the uniform soup. Trainings that start from the same weights and
differ in the order of their data end in one basin of the loss, so that the average of their weights is a model too,
mostly a better one than any of them, and one that costs no more to run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from leanformers.training.callbacks import Callback

Result = TypeVar("Result")


def averaged(
    model: nn.Module,
    train: Callable[[int], Result],
    runs: int,
    cut: Callable[[Result], bool] = lambda result: False,
) -> list[Result]:
    """Train `runs` times from the model's present weights, and leave the average of the outcomes in it.

    Args:
        model: trained in place. Only parameters that require gradients are set back and averaged.
        train: trains the model in place; told the number of the run, from 0.
        cut: whether a training, by what it returned, was ended early. No further one is begun then, and the cut one
            counts only where there is no whole one: its learning rate was still high, and its weights are noisy.

    Returns:
        What `train` returned, by run that counts. Memory: two copies of the trained weights on the CPU, one in float32.
    """
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().to("cpu", copy=True) for name, p in weights.items()}
    mean = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in start.items()}
    results = []
    for run in range(runs):
        if run:
            _put(weights, start)
        result = train(run)
        ended = cut(result)
        if ended and run:
            break
        results.append(result)
        for name, p in weights.items():
            mean[name] += (p.detach().to("cpu", torch.float32) - mean[name]) / (run + 1)
        if ended:
            break
    _put(weights, mean)
    return results


@dataclass(frozen=True)
class Member:
    """A callback of a soup, in its `run`-th of `runs` trainings: told the steps of the whole soup."""

    callback: Callback
    run: int
    runs: int

    def after_step(self, model: Any, step: int, total: int) -> None:
        self.callback.after_step(model, self.run * total + step, self.runs * total)


def _put(weights: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(values[name])
