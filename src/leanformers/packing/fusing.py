"""Feed-forwards of a packed model with their activation fused into the first linear, where they are plain.

No family has code of its own: a linear that reads the residual stream and the one GELU module beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from leanformers.anatomy import Anatomy
from leanformers.kernels.linear_gelu import linear_gelu


class LinearGelu(nn.Linear):
    """gelu(x @ weight.T + bias), with the parameters of the linear whose place it takes."""

    replayed: bool

    @classmethod
    def of(cls, linear: nn.Linear, *, replayed: bool = False) -> LinearGelu:
        made = cls(linear.in_features, linear.out_features, device="meta")
        made.weight, made.bias, made.replayed = linear.weight, linear.bias, replayed
        return made.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return linear_gelu(x, self.weight, self.bias, replayed=self.replayed)


def fuse(anatomy: Anatomy, *, replayed: bool = False) -> int:
    """Fuse what can be fused in a model that is nobody else's; the number of layers where it could be.

    replayed: it will run in CUDA graphs.
    """
    fused = 0
    for layer in anatomy.layers:
        part = layer.feed_forward
        if part.absent or part.activation != "gelu" or any(role == "gate" for role, _ in part.projections()):
            continue
        path = next(p.path for role, p in part.projections() if role == "up")
        parent_path, _, name = path.rpartition(".")
        parent: Any = anatomy.module(parent_path) if parent_path else anatomy.base
        up = getattr(parent, name)
        activations = [key for key, child in parent.named_children() if _is_gelu(child)]
        if type(up) is nn.Linear and up.bias is not None and len(activations) == 1:
            setattr(parent, name, LinearGelu.of(up, replayed=replayed))
            setattr(parent, activations[0], nn.Identity())
            fused += 1
    return fused


def _is_gelu(module: nn.Module) -> bool:
    from transformers.activations import GELUActivation

    if isinstance(module, nn.GELU):
        return module.approximate == "none"
    return isinstance(module, GELUActivation) and module.act is nn.functional.gelu
