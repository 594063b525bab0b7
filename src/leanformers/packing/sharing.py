"""A second model on the same weights."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch

M = TypeVar("M", bound=torch.nn.Module)


def sharing(model: M) -> M:
    """A copy of the model that shares its parameters and buffers, and nothing else."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, tensors)  # a tensor in the memo is its own copy
