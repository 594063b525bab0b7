"""The inverse empirical Fisher of a weight in diagonal blocks, built gradient by gradient, and the gradients for it.

With F = (1/m) sum g g^T the loss near a trained point rises by 1/2 d^T F d. A block holds consecutive entries of one
weight, flattened; blocks never cross weights. (damp I + F)^-1 comes from m rank-one updates of the inverse (Woodbury),
so neither F nor the gradients are kept. Second-order pruning reads three things off it: what losing a weight costs,
what losing a group costs, and how the others make up for it (Hassibi and Stork 1992; Kurtic et al. 2022, section 3).
Memory: 4 n B bytes for n weights in blocks of B; time: 4 n B FLOPs a gradient.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leanformers.errors import LeanError
from leanformers.training.batches import BucketSampler, Collator, length_of
from leanformers.training.progress import bar

_BATCH = 32768  # matrices of one batched product: kernels of some libraries take fewer than 65536


class BlockFisher:
    """(damp I + (1/count) sum g g^T)^-1 of `numel` weights, in blocks of `block_size`; the last one is padded."""

    def __init__(
        self,
        numel: int,
        block_size: int,
        damp: float,
        count: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.numel, self.block_size, self.count = numel, min(block_size, numel), count
        blocks = math.ceil(numel / self.block_size)
        self.inverse = torch.zeros(blocks, self.block_size, self.block_size, device=device, dtype=dtype)
        self.inverse.diagonal(dim1=1, dim2=2).fill_(1 / damp)
        self.gradients = 0

    @torch.no_grad()
    def add(self, gradient: Tensor) -> None:
        """Take in one gradient, of any shape with `numel` entries in the weight's order."""
        for inverse, part in zip(self.inverse.split(_BATCH), self._blocks(gradient).split(_BATCH), strict=True):
            step = torch.bmm(inverse, part[:, :, None])[:, :, 0]  # [blocks, B]
            step /= (self.count + (part * step).sum(1, keepdim=True)).sqrt()  # shared evenly: stays symmetric
            inverse.baddbmm_(step[:, :, None], step[:, None, :], alpha=-1)
        self.gradients += 1

    @torch.no_grad()
    def scores(self, weight: Tensor, group: int = 1) -> Tensor:
        """Half the loss that goes with each group of consecutive weights: [numel / group], float32, not negative.

        Raises:
            LeanError: the inverse is no longer positive definite.
        """
        blocks = self._blocks(weight)
        if group == 1:
            scores = blocks.square() / (2 * self._diagonal())
        else:
            scores = (self._solved(blocks, group) * blocks).view(len(blocks), -1, group).sum(-1) / 2
            if not bool((scores >= 0).all()):
                raise LeanError(_UNSTABLE)
        return scores.flatten()[: math.ceil(self.numel / group)]

    @torch.no_grad()
    def compensation(self, weight: Tensor, pruned: Tensor, group: int = 1) -> Tensor:
        """What to add to all weights when the `pruned` ones (bool, whole groups) go: [numel].

        For one weight or group the sum is the least of 1/2 d^T F d that makes it zero. Those of several are added up,
        without their interaction, so that the pruned ones must still be set to zero.
        """
        blocks, gone = self._blocks(weight), self._blocks(pruned)
        taken = (blocks / self._diagonal() if group == 1 else self._solved(blocks, group)) * gone
        parts = zip(self.inverse.split(_BATCH), taken.split(_BATCH), strict=True)
        moves = torch.cat([torch.bmm(inverse, part[:, :, None]) for inverse, part in parts])  # [blocks, B, 1]
        return -moves.flatten()[: self.numel]

    def _diagonal(self) -> Tensor:
        diagonal = self.inverse.diagonal(dim1=1, dim2=2)  # [blocks, B]
        if not bool((diagonal > 0).all()):
            raise LeanError(_UNSTABLE)
        return diagonal

    def _solved(self, blocks: Tensor, group: int) -> Tensor:
        """([F^-1]_QQ)^-1 w_Q of each group Q of a block: [blocks, B]."""
        count, size = blocks.shape
        grouped = self.inverse.view(count, size // group, group, size // group, group)
        inner = grouped.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [blocks, groups, group, group]
        solved: Tensor = torch.linalg.solve(inner, blocks.view(count, -1, group, 1))
        return solved.reshape(count, size)

    def _blocks(self, values: Tensor) -> Tensor:
        flat = values.reshape(-1).to(self.inverse)
        return nn.functional.pad(flat, (0, -self.numel % self.block_size)).view(-1, self.block_size)


_UNSTABLE = "the inverse Fisher is not positive definite any more: raise damp, or lower the number of gradients"


def fisher_bytes(numel: int, block_size: int) -> int:
    """Bytes of a BlockFisher of that many weights."""
    return 4 * math.ceil(numel / block_size) * block_size * block_size


def stream_gradients(
    model: Any,
    task: Any,
    tokenizer: Any,
    weights: Mapping[str, nn.Parameter],
    take: Callable[[str, Tensor], None],
    *,
    count: int,
    batch_size: int,
    seed: int = 0,
    progress: Any = False,
    label: str = "Gradients",
) -> None:
    """Call `take(name, gradient)` for each weight and each of `count` batches of training rows.

    A gradient is that of the task's mean loss over one batch, in eval mode. It is handed over as the backward pass
    reaches it and freed at once; nothing else of the model gets one. Batches are drawn by the seed, in rounds over the
    data where there is too little of it.

    Raises:
        LeanError: no training rows, or a loss or gradient that is not finite.
    """
    features = task.features(tokenizer, "train", min(len(task.splits["train"]), count * batch_size))
    if not features:
        raise LeanError(f"Task {task.name} has no training examples to take gradients from.")
    collate = Collator(task, tokenizer, seed)
    finite = torch.ones((), dtype=torch.bool, device=next(iter(weights.values())).device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(only(model, weights.values()))
        stack.enter_context(_evaluating(model))
        for name, weight in weights.items():

            def taken(parameter: Tensor, name: str = name) -> None:
                gradient, parameter.grad = parameter.grad, None
                assert gradient is not None
                finite.logical_and_(gradient.isfinite().all().to(finite.device))
                take(name, gradient)

            stack.callback(weight.register_post_accumulate_grad_hook(taken).remove)
        advance = stack.enter_context(bar(progress, label, count))
        stack.enter_context(torch.enable_grad())
        for number, keys in enumerate(_draws(features, batch_size, seed, count)):
            batch = collate([(epoch, index, features[index]) for epoch, index in keys])
            task.loss(task.forward(model, batch), batch).backward()
            advance()
            if number in (0, count - 1) and not bool(finite):
                raise LeanError(
                    f"Task {task.name}: a gradient of the model is not finite; load the model in float32 or bfloat16."
                )


def _draws(features: Any, batch_size: int, seed: int, count: int) -> Iterator[list[Any]]:
    sampler = BucketSampler([length_of(feature) for feature in features], batch_size, seed)
    given = 0
    while True:
        for keys in sampler:
            if len(keys) < min(batch_size, len(features)):  # a ragged last batch would weigh as much as a full one
                continue
            if given == count:
                return
            yield keys
            given += 1
        sampler.epoch += 1


@contextlib.contextmanager
def only(model: nn.Module, weights: Any) -> Iterator[None]:
    """Ask gradients of these weights alone; then as it was, and no gradient is left behind."""
    chosen = {id(weight) for weight in weights}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, asked in before:
            if parameter.is_floating_point():
                parameter.requires_grad_(asked)
            if id(parameter) in chosen:
                parameter.grad = None


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device now; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    return None
