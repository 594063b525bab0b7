"""Query, key and value of a packed model as one product, without a second copy of their weights.

Three linears of one input are one linear with their weights end to end. So that nothing is held twice and no edit of a
weight is missed, the weights themselves are laid end to end: the parameters stay the objects that they were, with the
values that they had, and are views of one tensor from then on. Where they lie so no longer (the model was moved), or
where gradients are wanted, each linear computes its own. No family has code of its own: what the anatomy calls query,
key and value, where these are plain linears.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import linear

from leanformers.anatomy import Anatomy

_ALIGNED = 16  # bytes, as a GPU's products want what they read


class Together:
    """Linears of one input, all computed when the first is asked for its output."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self.laid = False  # end to end, as far as is known; `products` looks again
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []

    def look(self) -> None:
        """See whether the weights lie end to end."""
        weights, biases = self._weights()
        self.laid = end_to_end(weights) is not None and (not biases or end_to_end(biases) is not None)

    def output(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """Of the member at a place, for an input [..., in_features]; what the others will be asked for is kept."""
        if self._input is not x:
            weights, biases = self._weights()
            whole = products(x, weights, biases)  # [..., sum of out_features]
            self._input, self._outputs = x, list(whole.split([len(weight) for weight in weights], -1))
        found, self._outputs[place] = self._outputs[place], None
        if all(output is None for output in self._outputs):
            self._input = None
        return self.members[place].alone(x) if found is None else found

    def _weights(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        biases: list[torch.Tensor] = [member.bias for member in self.members if member.bias is not None]
        return [member.weight for member in self.members], biases


class Member(nn.Linear):
    """x @ weight.T + bias, computed with that of its neighbours; with the parameters of the linear it stands for."""

    together: Together
    place: int

    @classmethod
    def of(cls, stock: nn.Linear, place: int) -> Member:
        made = cls(stock.in_features, stock.out_features, bias=stock.bias is not None, device="meta")
        made.weight, made.bias, made.place = stock.weight, stock.bias, place
        return made.train(stock.training)

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], a view of what was computed together."""
        wants_gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not self.together.laid or wants_gradient or torch.is_autocast_enabled(x.device.type):
            return self.alone(x)
        return self.together.output(self.place, x)


def join(anatomy: Anatomy) -> int:
    """Join query, key and value in a model that is nobody else's; the number of attentions where it could be done.

    Their weights, which others may share, are laid end to end.
    """
    joined = 0
    for layer in anatomy.layers:
        for attention in layer.attentions():
            parts = [attention.query, attention.key, attention.value]
            if attention.cross or any(part.fused for part in parts):
                continue
            linears = [part.module for part in parts]
            if all(type(one) is Member for one in linears):  # layers that share their modules
                continue
            if any(type(one) is not nn.Linear for one in linears) or not lay(linears):
                continue
            together = Together([Member.of(one, place) for place, one in enumerate(linears)])
            for part, member in zip(parts, together.members, strict=True):
                parent, _, name = part.path.rpartition(".")
                member.together = together
                setattr(anatomy.module(parent) if parent else anatomy.base, name, member)
            joined += 1
    look(anatomy.base)
    return joined


def look(model: nn.Module) -> None:
    """See which weights lie end to end, after a model was moved or copied."""
    for together in {id(m.together): m.together for m in model.modules() if isinstance(m, Member)}.values():
        together.look()


def lay(linears: Sequence[nn.Linear]) -> bool:
    """Lay the weights of linears end to end, and their biases; whether they lie so now.

    Left alone are weights that are views of something already, or of which one belongs to two linears.
    """
    groups: list[list[torch.Tensor]] = [[one.weight for one in linears]]
    biases: list[torch.Tensor] = [one.bias for one in linears if one.bias is not None]
    if len({one.in_features for one in linears}) > 1 or len(biases) not in (0, len(linears)):
        return False
    groups += [biases] if biases else []
    if any(not _can_be_laid(tensors) for tensors in groups):
        return False
    for tensors in groups:
        if end_to_end(tensors) is None:
            whole = torch.cat([tensor.detach() for tensor in tensors])
            for tensor, part in zip(tensors, whole.split([len(tensor) for tensor in tensors]), strict=True):
                tensor.data = part
    return True


def _can_be_laid(tensors: Sequence[torch.Tensor]) -> bool:
    if end_to_end(tensors) is not None:
        return True
    kinds = {(tensor.dtype, tensor.device, tensor.layout, type(tensor.data)) for tensor in tensors}
    if len(kinds) > 1 or type(tensors[0].data) is not torch.Tensor or len(set(map(id, tensors))) < len(tensors):
        return False
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    whole = all(t.is_contiguous() and t.untyped_storage().nbytes() == n for t, n in zip(tensors, sizes, strict=True))
    return whole and all(size and size % _ALIGNED == 0 for size in sizes)


def end_to_end(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One view of tensors that lie one after another in one storage, along the first axis; None where they do not."""
    first = tensors[0]
    storage, at = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.data_ptr() != at or tensor.dtype != first.dtype:
            return None
        if tensor.untyped_storage().data_ptr() != storage or tensor.shape[1:] != first.shape[1:]:
            return None
        at += tensor.numel() * tensor.element_size()
    shape = (sum(len(tensor) for tensor in tensors), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride())


@torch.library.custom_op("leanformers::products", mutates_args=())
def products(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> torch.Tensor:
    """x [..., in_features] times each weight, biases added if there are any -> [..., sum of out_features].

    One operation, so that a compiler need not know where the weights lie.
    """
    weight, bias = end_to_end(weights), end_to_end(biases) if biases else None
    if weight is None or (biases and bias is None):
        each = [linear(x, one) for one in weights]
        return torch.cat([out + b for out, b in zip(each, biases, strict=True)] if biases else each, -1)
    return linear(x, weight, bias)


@products.register_fake
def _(x, weights, biases):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], sum(len(weight) for weight in weights))
