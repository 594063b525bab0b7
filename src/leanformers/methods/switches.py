"""A model with parts switched off for a trial: whole sub-layers, single heads and neurons, soft attention.

Hooks silence what is off, so that a trial costs no copy and leaves no trace; what is decided becomes edits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from leanformers.anatomy import Anatomy, Attention, FeedForward
from leanformers.errors import LeanError
from leanformers.parts.attention import put_mixer, switch_on, take_mixer
from leanformers.surgery import DropSublayers, KeepHeads, KeepNeurons, SwapAttention
from leanformers.surgery.edits.swap_attention import MIXERS


@dataclass(kw_only=True)
class Switch:
    """What is off of one sub-layer.

    gone: all of it. members: heads (key/value heads with their query heads) or neurons, by index. mixed: name and
    settings of the mixer in place of soft attention.
    """

    part: Attention | FeedForward
    gone: bool = False
    members: set[int] = field(default_factory=set)
    mixed: tuple[str, dict[str, Any]] | None = None

    @property
    def size(self) -> int:
        """How many heads or neurons there are."""
        return self.part.num_key_value_heads if isinstance(self.part, Attention) else self.part.intermediate_size

    @property
    def last(self) -> nn.Module:
        """The linear at the end: every head and every neuron has input features of it."""
        module: nn.Module = (self.part.output if isinstance(self.part, Attention) else self.part.down).module
        return module

    def columns(self) -> Tensor:
        """The input features of ``last`` that belong to the members which are off, int64."""
        off = torch.tensor(sorted(self.members))
        if not isinstance(self.part, Attention):
            return off
        width = self.part.num_attention_heads // self.part.num_key_value_heads * self.part.head_dim
        return (off[:, None] * width + torch.arange(width)).flatten()

    def mix(self, name: str, settings: dict[str, Any]) -> None:
        """Put a mixer in place of soft attention; in `hooked(mixing=True)` alone."""
        assert isinstance(self.part, Attention)
        put_mixer(self.part.module, MIXERS[name].like(self.part, **settings).eval())
        self.mixed = (name, settings)

    def unmix(self) -> None:
        """Soft attention again."""
        if self.mixed is not None and isinstance(self.part, Attention):
            take_mixer(self.part.module)
        self.mixed = None


class Switches:
    """The switches of a model: `layers[index][name]`, by the names of `Layer.sublayers`."""

    def __init__(self, anatomy: Anatomy) -> None:
        if anatomy.reduces_tokens:
            raise LeanError(f"{type(anatomy.model).__name__} drops tokens in its layers: remove parts before that.")
        self.anatomy = anatomy
        self.layers = [
            {name: Switch(part=part) for name, part in layer.sublayers().items()} for layer in anatomy.layers
        ]

    @property
    def standing(self) -> int:
        """Sub-layers that are not gone."""
        return sum(not switch.gone for switches in self.layers for switch in switches.values())

    @contextmanager
    def hooked(self, *, mixing: bool = False) -> Iterator[None]:
        """Inside, the model computes what the switches say; afterwards it is as it was. mixing: mixers may be tried."""
        before = switch_on(self.anatomy.model) if mixing else None
        with ExitStack() as stack:
            for handle in self._handles():
                stack.callback(handle.remove)
            try:
                yield
            finally:
                for switches in self.layers:
                    for switch in switches.values():
                        if switch.mixed is not None and isinstance(switch.part, Attention):
                            take_mixer(switch.part.module)
                if before is not None:
                    switch_on(self.anatomy.model, before)

    def _handles(self) -> Iterator[Any]:
        for layer, switches in zip(self.anatomy.layers, self.layers, strict=True):
            for name, switch in switches.items():
                yield switch.last.register_forward_pre_hook(_without_members(switch))
                ends = [norm.module for norm in layer.norms if norm.reads == name and norm.place in ("output", "scale")]
                for end in (switch.last, *ends):
                    yield end.register_forward_hook(_without_all(switch))

    def apply(self, subject: Any) -> None:
        """Make the edits that the switches stand for, outside `hooked`."""
        for layer, switches in zip(self.anatomy.layers, self.layers, strict=True):
            if gone := tuple(name for name, switch in switches.items() if switch.gone):
                subject.apply(DropSublayers(path=layer.path, sublayers=gone))
            for switch in switches.values():
                path = switch.part.path
                if not switch.gone and switch.members:
                    keep = torch.tensor(sorted(set(range(switch.size)) - switch.members))
                    edit = KeepHeads if isinstance(switch.part, Attention) else KeepNeurons
                    subject.apply(edit(path=path, size=len(keep)), keep=keep)
                if not switch.gone and switch.mixed is not None:
                    name, settings = switch.mixed
                    subject.apply(SwapAttention(path=path, mixer=name, settings=settings))


class LowerLayers:
    """The layers before one are run once for each batch; in later passes over the same batches, unchanged as they
    are, they answer what they did. What the last of them in each stack did is held, for all batches."""

    def __init__(self, anatomy: Anatomy, index: int) -> None:
        self.index = index
        self._layers = anatomy.layers[: max(index, 0)]
        self._held: dict[int, dict[str, Any]] = {}

    @contextmanager
    def standing_in(self, number: int) -> Iterator[None]:
        """For one forward pass over the batch of this number."""
        with ExitStack() as stack:
            if number not in self._held:
                held = self._held[number] = {}
                for name, layer in {layer.stack: layer for layer in self._layers}.items():
                    stack.callback(layer.module.register_forward_hook(_keep_output(held, name)).remove)
            else:
                for layer in self._layers:
                    stack.enter_context(_answering(layer.module, self._held[number][layer.stack]))
            yield


@contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def _keep_output(held: dict[str, Any], name: str) -> Callable[..., None]:
    return lambda module, args, output: held.update({name: output})


def _without_members(switch: Switch) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if switch.gone or not switch.members:
            return None
        return (args[0].index_fill(-1, switch.columns().to(args[0].device), 0), *args[1:])

    return hook


def _without_all(switch: Switch) -> Callable[..., Any]:
    return lambda module, args, output: torch.zeros_like(output) if switch.gone else None
