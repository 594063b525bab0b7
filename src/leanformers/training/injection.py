"""Linears that learn to use another block's weights beside their own (FuseGPT), while they are trained.

W_eff = W + B A + sum_k (C_k D_k) * W_k, with * elementwise: W and the injected W_k stay as they are, in the model's
dtype; C, D, B, A are float32. All of it lies beside the block, which is called with the effective tensors in place
of its own, so that a model is never taken apart and folding is a copy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from leanformers.anatomy import Anatomy, Layer, is_conv1d, is_linear
from leanformers.parts.linear import LowRankLinear

_MOST = 4
"""Injections that a linear carries; before one more the older are folded, which bounds the memory of a group."""


class Injection:
    """What is added to one linear [out, in]: B A [out, in] and, per injected linear, C D [out, in] and c [out]."""

    def __init__(self, linear: Any, adapter_rank: int, generator: torch.Generator) -> None:
        self.linear, self.generator = linear, generator
        self.sources: list[Any] = []
        self.c: list[Tensor] = []
        self.d: list[Tensor] = []
        self.bias: list[Tensor] = []  # c of the card, where the linear has a bias
        self.b, self.a = self._product(adapter_rank)

    def inject(self, source: Any, rank: int) -> None:
        """Add the linear ``source`` of the same shape, with coefficients of this rank that start at 0."""
        if len(self.sources) == _MOST:
            self.fold()
        c, d = self._product(rank)
        self.c.append(c)
        self.d.append(d)
        if self.linear.bias is not None:
            self.bias.append(torch.zeros(len(c), device=c.device, requires_grad=True))
        self.sources.append(source)

    def effective(self) -> dict[str, Tensor]:
        """The linear's ``weight``, as it stores it, and its ``bias`` where it has one, with all that was added."""
        own = _weight(self.linear)
        weight = own + self.b @ self.a if self.b.numel() else own  # float32 from here on
        for c, d, source in zip(self.c, self.d, self.sources, strict=True):
            weight = weight + (c @ d) * _weight(source).to(own.device)
        weight = weight.to(own.dtype)
        tensors = {"weight": weight.t() if is_conv1d(self.linear) else weight}
        if self.linear.bias is not None:
            bias = self.linear.bias.detach()
            for vector, source in zip(self.bias, self.sources, strict=True):
                bias = bias + vector * source.bias.detach().to(bias.device)
            tensors["bias"] = bias.to(self.linear.bias.dtype)
        return tensors

    @torch.no_grad()
    def fold(self) -> None:
        """Write the effective tensors into the linear; the injections are gone, B A starts again at 0."""
        for name, tensor in self.effective().items():
            getattr(self.linear, name).copy_(tensor)
        self.b.zero_()
        self.c, self.d, self.bias, self.sources = [], [], [], []

    def coefficients(self) -> list[Tensor]:
        """C, D and c of every injection."""
        return [*self.c, *self.d, *self.bias]

    def adapters(self) -> list[Tensor]:
        """B and A, unless their rank is 0."""
        return [self.b, self.a] if self.b.numel() else []

    def _product(self, rank: int) -> tuple[Tensor, Tensor]:
        """Zeros [out, rank], and Kaiming-uniform (a = sqrt 5) [rank, in], float32; drawn on the CPU."""
        out_features, in_features = _weight(self.linear).shape
        right = (torch.rand(rank, in_features, generator=self.generator) * 2 - 1) / math.sqrt(in_features)
        device = self.linear.weight.device
        left = torch.zeros(out_features, rank, device=device, requires_grad=True)
        return left, right.to(device).requires_grad_()


class Injected:
    """One block under training: its linears' injections by name, and a shift of each parameter of its norms."""

    def __init__(self, layer: Layer, adapter_rank: int, generator: torch.Generator) -> None:
        self.block: nn.Module = layer.module
        self.linears = {
            name: Injection(linear, adapter_rank, generator) for name, linear in dense_linears(self.block).items()
        }
        self.norms = _norms(layer)
        self.shifts = {
            name: torch.zeros_like(tensor, dtype=torch.float32).requires_grad_() for name, tensor in self.norms.items()
        }

    def inject(self, block: nn.Module, rank: int) -> None:
        """Inject every linear of another block into the one of the same name."""
        for name, source in dense_linears(block).items():
            self.linears[name].inject(source, rank)

    def effective(self) -> dict[str, Tensor]:
        """The block's parameters as trained, by name relative to it; gradients reach nothing of its own."""
        tensors = {name: tensor.detach() for name, tensor in self.block.named_parameters()}
        for name, shift in self.shifts.items():
            tensors[name] = (tensors[name] + shift).to(tensors[name].dtype)
        for name, injection in self.linears.items():
            tensors.update({f"{name}.{leaf}": tensor for leaf, tensor in injection.effective().items()})
        return tensors

    @torch.no_grad()
    def fold(self) -> None:
        """Write all effective tensors into the block, whose own modules then hold what was trained."""
        for injection in self.linears.values():
            injection.fold()
        for name, tensor in self.norms.items():
            tensor.copy_(tensor + self.shifts[name])  # added in float32
            self.shifts[name].zero_()

    def coefficients(self) -> list[Tensor]:
        """C, D and c of every injection of every linear."""
        return [tensor for part in self.linears.values() for tensor in part.coefficients()]

    def adapters(self) -> list[Tensor]:
        """B and A of every linear, and the shifts of the norms."""
        return [tensor for part in self.linears.values() for tensor in part.adapters()] + list(self.shifts.values())


def dense_linears(block: nn.Module) -> dict[str, Any]:
    """The linears of a block with one float weight, by name relative to it."""
    return {
        name: module for name, module in block.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)
    }


def unlike(anatomy: Anatomy) -> str | None:
    """Why the blocks cannot be injected into each other, in one sentence; None if they can."""
    first: dict[str, str] | None = None
    seen: set[int] = set()
    for layer in anatomy.layers:
        for name, module in layer.module.named_modules():
            if is_linear(module) and not isinstance(module, LowRankLinear) and not _plain(module):
                what = f"{layer.path}.{name} is a {type(module).__name__}, into which nothing can be injected"
                return f"{what}; fuse blocks before masking or quantising"
        shapes = {name: _shape(module) for name, module in dense_linears(layer.module).items()}
        if any(id(module.weight) in seen for module in dense_linears(layer.module).values()):
            return f"{layer.path} shares weights with a block before it; blocks that go must have their own"
        seen |= {id(module.weight) for module in dense_linears(layer.module).values()}
        first = first or shapes
        if shapes != first:
            name = next(name for name in {**first, **shapes} if first.get(name) != shapes.get(name))
            return (
                f"{name} is {shapes.get(name, 'missing')} in {layer.path} and {first.get(name, 'missing')} in "
                f"{anatomy.layers[0].path}; fuse blocks while all have the same linears"
            )
    return None


def _shape(module: Any) -> str:
    return f"{list(module.weight.shape)}{'' if module.bias is None else ' with a bias'}"


def _plain(module: Any) -> bool:
    return (type(module) is nn.Linear or is_conv1d(module)) and module.weight.is_floating_point()


def _weight(linear: Any) -> Tensor:
    """[out, in], a frozen view."""
    weight = linear.weight.detach()
    return weight.t() if is_conv1d(linear) else weight


def _norms(layer: Layer) -> dict[str, nn.Parameter]:
    """The parameters of the block's norms, those of the heads included, by name relative to the block."""
    modules = [norm.module for norm in layer.norms]
    modules += [norm for part in layer.attentions() for norm in (part.query_norm, part.key_norm) if norm is not None]
    own = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name: parameter for name, parameter in layer.module.named_parameters() if id(parameter) in own}
