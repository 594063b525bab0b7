"""Calibration batches that wait in front of one block: what a method holds while it walks through a model.

Each batch is run up to the first block once (`Blocks`); from there on a method replaces its hidden states block by
block. So at any time one block's activations are held, however many blocks the model has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leanformers.errors import Enough, LeanError
from leanformers.training.blockwise import Blocks, Start


@dataclass(eq=False)
class Held:
    """One batch in front of a block.

    states: [batch, length, hidden_size], replaced by whoever walks. real: bool [batch, length], None where no token
    is padding.
    """

    states: Tensor
    real: Tensor | None
    _start: Start

    def run(self, index: int) -> Tensor:
        """The output of block ``index`` on the states."""
        return self._start.run(index, self.states)

    def tokens(self, states: Tensor) -> Tensor:
        """The rows of [batch, length, width] that are no padding: [tokens, width]."""
        return states.flatten(0, 1) if self.real is None else states[self.real.to(states.device)]

    def watch(self, index: int, inputs: Sequence[nn.Module] = (), outputs: Sequence[nn.Module] = ()) -> list[Tensor]:
        """What goes into and comes out of modules of block ``index``, which is run no further than needed.

        Returns:
            The first input of each of ``inputs``, then the output of each of ``outputs``; both in order.
        """
        seen: dict[tuple[str, int], Tensor] = {}
        wanted = [("input", module) for module in inputs] + [("output", module) for module in outputs]

        def note(key: tuple[str, int], tensor: Tensor) -> None:
            seen[key] = tensor
            if len(seen) == len(wanted):
                raise Enough

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            note(("input", id(module)), args[0])

        def after(module: nn.Module, _: Any, output: Tensor) -> None:
            note(("output", id(module)), output)

        handles = [module.register_forward_pre_hook(before) for module in inputs]
        handles += [module.register_forward_hook(after) for module in outputs]
        try:
            self.run(index)
        except Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [seen[side, id(module)] for side, module in wanted]


@torch.no_grad()
def hold(blocks: Blocks, batches: Iterable[Mapping[str, Tensor]]) -> list[Held]:
    """The batches in front of the first block.

    Raises:
        LeanError: there is no batch, or the model's blocks cannot be run one by one.
    """
    held = []
    for batch in batches:
        start = blocks.start(batch)
        # The start forgets its hidden states: they are replaced, and would stay alive in it.
        rest = dataclasses.replace(start, hidden_states=start.hidden_states.new_empty(0))
        held.append(Held(start.hidden_states, blocks.real(batch, start.hidden_states), rest))
    if not held:
        raise LeanError("There is no text to calibrate on: the task needs training rows.")
    return held
