"""Blocks outside their model's loop: run in any order, and trained to give back recorded outputs.

For methods that look at a model block by block (what happens without this one?) or mend it so: FuseGPT's groups,
reconstruction after pruning or quantisation. `Blocks` asks the model itself for what its loop hands to each block
(masks, rotary tables) and runs the blocks from there; `reconstruct` trains a few of them, one step per batch, with
inputs and outputs on the CPU, so that what is held beside the blocks does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from leanformers.anatomy import Anatomy
from leanformers.errors import Enough, LeanError
from leanformers.training import losses
from leanformers.training.errors import TrainingDiverged
from leanformers.training.progress import bar

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_FAR = -1e30  # before a softmax: a share of 0, and still a number


@dataclass(frozen=True, eq=False)
class Start:
    """What one batch looks like where the blocks begin.

    hidden_states: [batch, length, hidden_size]. calls: of each block, what its model hands to it beside them.
    """

    hidden_states: Tensor
    modules: Sequence[nn.Module]
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]

    def run(self, index: int, hidden_states: Tensor, tensors: dict[str, Tensor] | None = None) -> Tensor:
        """The output of block ``index`` [batch, length, hidden_size], with ``tensors`` in place of those of its
        parameters and buffers that they name."""
        args, kwargs = self.calls[index]
        module = self.modules[index]
        if tensors is None:
            output = module(hidden_states, *args, **kwargs)
        else:
            output = functional_call(module, tensors, (hidden_states, *args), kwargs)
        return output[0] if isinstance(output, tuple) else output


class Blocks:
    """The blocks of a model of one stack, to be run apart from it.

    Args:
        anatomy: of the model; blocks keep their indices in it. Put the model in eval mode.
        run: one forward pass of the model on a batch, such as ``lambda batch: task.forward(model, batch)``.

    Raises:
        LeanError: the model has several stacks.
    """

    def __init__(self, anatomy: Anatomy, run: Callable[[Mapping[str, Tensor]], Any]) -> None:
        if len(anatomy.stacks) > 1:
            raise LeanError(
                f"{type(anatomy.model).__name__} has an encoder and a decoder; blocks are run one by one in models "
                "with a single stack."
            )
        if anatomy.reduces_tokens:
            raise LeanError(
                f"{type(anatomy.model).__name__} drops tokens between its blocks, which are run one by one here: "
                "reduce tokens last."
            )
        self.model, self.run = type(anatomy.model).__name__, run
        self.modules: list[nn.Module] = [layer.module for layer in anatomy.layers]
        self.outputs: int | None = None  # of a block: 0 for a bare tensor, else the size of its tuple

    @torch.no_grad()
    def start(self, batch: Mapping[str, Tensor]) -> Start:
        """Run the model up to its first block, and ask its loop what each block gets; no block is run.

        Raises:
            LeanError: the model computes something between its blocks, or runs them in another order.
        """
        first: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        before = [vars(module).get("forward") for module in self.modules]

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden_states, others, named = _taken(args, kwargs)
                first.append(hidden_states)
                if hidden_states is not first[0] or index != len(calls):
                    raise LeanError(
                        f"{self.model} does more between its blocks than to hand on hidden states, so they cannot be "
                        "run one by one."
                    )
                calls.append((others, named))
                if self.outputs is None:
                    original = before[index] or type(self.modules[index]).forward.__get__(self.modules[index])
                    output = original(hidden_states, *others, **named)
                    self.outputs = len(output) if isinstance(output, tuple) else 0
                if len(calls) == len(self.modules):
                    raise Enough
                return (hidden_states, *[None] * (self.outputs - 1)) if self.outputs else hidden_states

            return forward

        try:
            for index, module in enumerate(self.modules):
                vars(module)["forward"] = stand_in(index)
            self.run(batch)
        except Enough:
            pass
        finally:
            self._restore(before)
        if len(calls) < len(self.modules):
            raise LeanError(f"{self.model} ran {len(calls)} of its {len(self.modules)} blocks: run it in eval mode.")
        return Start(first[0], self.modules, calls)

    def _restore(self, before: Sequence[Any]) -> None:
        for module, forward in zip(self.modules, before, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward

    def real(self, batch: Mapping[str, Tensor], hidden_states: Tensor) -> Tensor | None:
        """Which of the batch's tokens are no padding: bool [batch, length], None where all are.

        Raises:
            LeanError: the batch is padded, and its mask does not count what the blocks see.
        """
        mask = batch.get("attention_mask")
        if mask is None or bool(mask.all()):
            return None
        if mask.shape != hidden_states.shape[:2]:
            raise LeanError(
                f"The attention mask has the shape {list(mask.shape)} and the blocks of {self.model} see "
                f"{list(hidden_states.shape[:2])}: give inputs of one length, without padding."
            )
        return mask.bool().to(hidden_states.device)


def _taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states, other arguments, named arguments of a block's call, without a cache."""
    from transformers import Cache

    named = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    if named.get("use_cache"):
        named["use_cache"] = False
    hidden_states: Any = args[0] if args else named.pop("hidden_states")
    return hidden_states, tuple(None if isinstance(value, Cache) else value for value in args[1:]), named


def kl(student: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """KL(target || student) of softmaxes over the hidden axis, in nats, averaged over the real tokens.

    student, target: [batch, length, hidden_size]. mask: bool [batch, length], None where all tokens are real.
    """
    return losses.logits(student, target, mask=mask)


def kl_dim0(student: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """KL of softmaxes across the *sequences* of a batch, summed and divided by their number: FuseGPT's code.

    A batch of one sequence has nothing to compare: its loss is 0.
    """
    states = [student.float(), target.float()]
    if mask is not None:  # padding is no sequence to compare with
        states = [each.masked_fill(~mask[..., None], _FAR) for each in states]
    log_student, log_target = (functional.log_softmax(each, 0) for each in states)
    terms = log_target.exp() * (log_target - log_student)
    return (terms if mask is None else terms * mask[..., None]).sum() / len(student)


def mse(student: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Squared error, averaged over the hidden axis and the real tokens."""
    return losses.regression(student, target, mask=mask)


LOSSES: dict[str, Loss] = {"kl": kl, "kl_dim0": kl_dim0, "mse": mse}


def reconstruct(
    forward: Callable[[int, Tensor], Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    groups: Iterable[dict[str, Any]],
    *,
    epochs: int,
    loss: str = "kl",
    masks: Sequence[Tensor | None] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    seed: int = 0,
    progress: Any = False,
    label: str = "blocks",
) -> list[float]:
    """Train the parameters of ``groups`` until ``forward(index, inputs[index])`` comes near ``targets[index]``.

    Args:
        forward: the blocks under training; gets a batch's index and its input on the parameters' device.
        inputs, targets: one [batch, length, hidden_size] per batch, on any device, in any float dtype.
        groups: parameter groups as torch's optimisers take them, each with ``params`` and ``lr``. Groups without
            parameters are passed over. Parameters are best kept in float32.
        epochs: passes over the batches, in an order that depends on ``seed`` and the epoch alone.
        loss: of LOSSES. masks: bool [batch, length] per batch, true at real tokens; None where all are.
        progress: as for ``training.progress.bar``, under ``label``.

    Returns:
        The mean loss of each epoch, taken before each step: the first one starts from the untrained blocks.

    Raises:
        LeanError: an unknown loss, or inputs and targets that do not match.
        TrainingDiverged: the loss is no longer finite.
    """
    if loss not in LOSSES:
        raise LeanError(f"Unknown loss {loss!r}; choose one of {', '.join(LOSSES)}.")
    if not inputs or len(inputs) != len(targets):
        raise LeanError(f"{len(inputs)} batches of inputs and {len(targets)} of outputs: give as many, at least one.")
    groups = [{**group, "params": list(group["params"])} for group in groups]
    groups = [group for group in groups if group["params"]]
    if epochs <= 0 or not groups:
        return []
    device = groups[0]["params"][0].device
    optimiser = torch.optim.Adam(groups, betas=betas, eps=eps)
    steps = epochs * len(inputs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    generator = torch.Generator().manual_seed(seed)
    history: list[float] = []
    with bar(progress, label, steps) as advance, torch.enable_grad():
        for epoch in range(epochs):
            total = torch.zeros((), device=device)
            for index in torch.randperm(len(inputs), generator=generator).tolist():
                mask = masks[index] if masks is not None else None
                output = forward(index, inputs[index].to(device, non_blocking=True))
                at = output.device  # that of the last block
                value = LOSSES[loss](output, targets[index].to(at), None if mask is None else mask.to(at))
                optimiser.zero_grad()
                value.backward()
                optimiser.step()
                schedule.step()
                total += value.detach().to(device)
                advance(1, note=f"loss {history[-1]:.3g}" if history else "")
            history.append(float(total) / len(inputs))
            if not math.isfinite(history[-1]):
                raise TrainingDiverged(
                    f"The local training of {label} diverged in epoch {epoch + 1}: lower the learning rate."
                )
    return history
