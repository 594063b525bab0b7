"""Model soups: several trainings from one start, and the average of their weights.

Source: Wortsman et al. (2022, arXiv 2203.05482), the uniform soup. Trainings that start from the same weights and
differ in the order of their data end in one basin of the loss, so that the average of their weights is a model too,
mostly a better one than any of them, and one that costs no more to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Result = TypeVar("Result")


def averaged(model: nn.Module, train: Callable[[int], Result], runs: int) -> list[Result]:
    """Train `runs` times from the model's present weights, and leave the average of the outcomes in it.

    Args:
        model: trained in place. Only parameters that require gradients are set back and averaged.
        train: trains the model in place; told the number of the run, from 0.

    Returns:
        What `train` returned, by run. Memory: two copies of the trained weights on the CPU, one in float32.
    """
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().to("cpu", copy=True) for name, p in weights.items()}
    mean = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in start.items()}
    results = []
    for run in range(runs):
        if run:
            _put(weights, start)
        results.append(train(run))
        for name, p in weights.items():
            mean[name] += (p.detach().to("cpu", torch.float32) - mean[name]) / (run + 1)
    _put(weights, mean)
    return results


def _put(weights: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(values[name])
