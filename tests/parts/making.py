"""The layers that parts replace, tiny and seeded, and a checkpoint on the way through safetensors."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from leanformers.parts import DenseSparseLinear, LowRankLinear, MaskedLinear, QuantisedLinear

IN, OUT, RANK = 24, 40, 8


def linear(bias: bool = True, in_features: int = IN, out_features: int = OUT, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias)


def conv1d() -> Conv1D:
    """The same matrix and bias as `linear()`, stored the other way round."""
    same, layer = linear(), Conv1D(OUT, IN)
    with torch.no_grad():
        layer.weight.copy_(same.weight.T)
        layer.bias.copy_(same.bias)
    return layer


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Float `[*shape, IN]`, one feature ten times the others as in trained models."""
    hidden_states = torch.randn(*shape, IN, generator=torch.Generator().manual_seed(seed))
    hidden_states[..., 3] *= 10
    return hidden_states


def random_mask(out_features: int = OUT, in_features: int = IN, seed: int = 2) -> torch.Tensor:
    return torch.rand(out_features, in_features, generator=torch.Generator().manual_seed(seed)) > 0.4


def low_rank(old: nn.Module, filled: bool = True) -> LowRankLinear:
    part = LowRankLinear.like(old, RANK)
    if filled:
        part.carry(old)
    return part


def dense_sparse(old: nn.Module, filled: bool = True, mode: str = "materialised") -> DenseSparseLinear:
    part = DenseSparseLinear.like(old, rank=10, width=8, nonzeros=3, mode=mode)
    if filled:
        part.carry(old)
    return part


def factored(old: nn.Module, filled: bool = True) -> DenseSparseLinear:
    return dense_sparse(old, filled, "factored")


def masked(old: nn.Module, filled: bool = True) -> MaskedLinear:
    part = MaskedLinear.like(old)
    if filled:
        part.carry(old, random_mask())
    return part


def weight_only(old: nn.Module, filled: bool = True) -> QuantisedLinear:
    part = QuantisedLinear.like(old, "int8_weight_only")
    if filled:
        part.carry(old)
    return part


def dynamic(old: nn.Module, filled: bool = True) -> QuantisedLinear:
    part = QuantisedLinear.like(old, "int8_dynamic")
    if filled:
        part.carry(old)
    return part


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "no bias": lambda: linear(bias=False),
    "conv1d": conv1d,
}
PARTS: dict[str, Callable[..., nn.Module]] = {
    "low rank": low_rank,
    "dense sparse": dense_sparse,
    "dense sparse, factored": factored,
    "masked": masked,
    "int8 weight-only": weight_only,
    "int8 dynamic": dynamic,
}


def reload(part: nn.Module, make: Callable[[nn.Module], nn.Module], old: nn.Module, folder: Path) -> nn.Module:
    """Saves the part, builds an empty one on meta in place of `old`, fills it by name from the file."""
    save_file(part.state_dict(), folder / "part.safetensors")
    empty = make(copy.deepcopy(old).to("meta"))
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    empty.load_state_dict(load_file(folder / "part.safetensors"), strict=True, assign=True)
    return empty
