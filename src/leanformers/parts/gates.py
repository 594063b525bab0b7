"""Variational information bottlenecks on activations, and norms that run over the dimensions that are let through.

Source: Dai, Zhu, Guo, Wipf (2018, arXiv 1802.10399) and VTrans (Dutta et al., 2024, arXiv 2406.05276).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_EPSILON = 1e-8  # in logarithms and ratios of what may be zero
_SLOPE = 10.0  # of the soft count: expected and actual sparsity then agree


class Gate(nn.Module):
    """Multiplies units by mean + sqrt(variance) * noise: in training with fresh noise for each row (token), in
    evaluation by the mean of the units in ``keep``, and by nothing for the others.

    A unit's information is its signal over its noise, log mean^2 - log variance: below 0 the unit can go. Parameters
    and all that is computed of them are float32 [size]; ``keep`` is a buffer, bool [size], at first true everywhere.
    """

    mean: Tensor
    log_variance: Tensor
    keep: Tensor

    def __init__(self, size: int, generator: torch.Generator | None = None) -> None:
        """Nearly transparent: mean about 1, variance about exp(-9)."""
        super().__init__()
        self.size = size
        self.mean = nn.Parameter(1 + 0.01 * torch.randn(size, generator=generator))
        self.log_variance = nn.Parameter(-9 + 0.01 * torch.randn(size, generator=generator))
        self.register_buffer("keep", torch.ones(size, dtype=torch.bool))

    def forward(self, states: Tensor) -> Tensor:
        """Gate the last axis [..., size * width]: ``width`` neighbours are one unit."""
        if self.training:
            noise = torch.randn(*states.shape[:-1], self.size, device=states.device)
            deviation = (0.5 * self.log_variance).exp()
            scale = self.mean.to(noise.device) + deviation.to(noise.device) * noise  # [..., size]
        else:
            scale = self.scale()
        return (states.unflatten(-1, (self.size, -1)) * scale[..., None].to(states)).flatten(-2)

    def scale(self) -> Tensor:
        """What a unit is multiplied by in evaluation; 0 where it is gone."""
        return self.mean * self.keep

    @torch.no_grad()
    def settle(self, keep: Tensor) -> None:
        """Keep these units, bool [size]; a kept mean is not so near 0 that nothing could be divided by it."""
        self.keep.copy_(keep)
        tiny = self.mean.abs() < 1e-4
        self.mean.copy_(torch.where(tiny, torch.full_like(self.mean, 1e-4), self.mean))

    def information(self) -> Tensor:
        """log mean^2 - log variance of each unit."""
        return (self.mean.square() + _EPSILON).log() - self.log_variance

    def divergence(self) -> Tensor:
        """Scalar: 1/2 sum log(1 + mean^2 / variance), the KL term with the prior's variance optimised away."""
        ratio = self.mean.square() / (self.log_variance.exp() + _EPSILON)
        return 0.5 * ratio.log1p().sum()

    def shares(self) -> Tensor:
        """How far each unit counts as kept, 0 to 1; its sum is the soft count."""
        return torch.sigmoid(_SLOPE * self.information())


def restricted_norm(states: Tensor, norm: Any, share: Tensor, *, rms: bool = False, offset: bool = False) -> Tensor:
    """What ``norm`` (a LayerNorm or RMSNorm [hidden_size]) gives where only a part of the dimensions exists.

    share: [hidden_size], 1 for a dimension that is there and 0 for one that is not; mean and variance are weighted by
    it, and so is the result: with zeros and ones it is the norm of a model cut to the ones. offset: the gain is
    1 + weight (Gemma).
    """
    x, share = states.float(), share.to(states.device)
    total = share.sum()
    if not rms:
        x = x - (x * share).sum(-1, keepdim=True) / total
    eps = float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)
    x = x * ((x.square() * share).sum(-1, keepdim=True) / total + eps).rsqrt()
    gain = norm.weight.float() * share + (share if offset else 0.0)
    x = x * gain
    bias: Tensor | None = getattr(norm, "bias", None)
    if bias is not None:
        x = x + bias.float() * share
    return x.to(states.dtype)
