"""Two outside references for one-shot unstructured pruning: Wanda, and pruning in the style of SparseGPT.

Wanda (Sun et al., 2023, arXiv 2306.11695): in each row of a linear the weights with the smallest |w| times the norm of
their input go. SparseGPT (Frantar, Alistarh, 2023, arXiv 2301.00774): blocks of columns lose the weights with the
smallest w^2 / [H^-1]_jj^2 (Cholesky factor), and the later columns are corrected. Both go block by block, each on the
outputs of the pruned blocks before it. Zeros save neither bytes nor time here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leanformers.methods import Subject
from leanformers.training.blockwise import Blocks

COLUMNS, DAMPENING = 128, 0.01


@torch.no_grad()
def prune(subject: Subject, rule: str, sparsity: float, samples: int) -> None:
    """Set a share of each linear of the blocks to zero, by ``rule``: "wanda" or "sparsegpt"."""
    anatomy = subject.anatomy
    subject.model.eval()
    blocks = Blocks(anatomy, lambda batch: subject.task.forward(subject.model, batch))
    batches = list(subject.calibration(samples, batch_size=8))
    starts = [blocks.start(batch) for batch in batches]
    masks = [blocks.real(batch, start.hidden_states) for batch, start in zip(batches, starts, strict=True)]
    states = [start.hidden_states for start in starts]
    for index, module in enumerate(blocks.modules):
        linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
        seen = _second_moments(linears, starts, states, masks, index)
        for name, linear in linears.items():
            RULES[rule](linear, seen[name], sparsity)
        states = [start.run(index, hidden) for start, hidden in zip(starts, states, strict=True)]


def _second_moments(
    linears: Mapping[str, nn.Module], starts: Any, states: list[Tensor], masks: list[Tensor | None], index: int
) -> dict[str, Tensor]:
    """Sum over real tokens of x x^T of each linear's inputs: [in, in], float32."""
    seen: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0] if mask is None else args[0][mask]
            x = x.reshape(-1, x.shape[-1]).float()
            seen[name] = seen.get(name, 0) + x.t() @ x

        return hook

    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        for start, hidden, mask in zip(starts, states, masks, strict=True):  # noqa: B007 (the hooks read it)
            start.run(index, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _wanda(linear: nn.Linear, moments: Tensor, sparsity: float) -> None:
    scores = linear.weight.float().abs() * moments.diagonal().sqrt()
    lowest = scores.argsort(dim=1, stable=True)[:, : round(sparsity * scores.shape[1])]
    linear.weight.scatter_(1, lowest, 0)


def _sparsegpt(linear: nn.Linear, moments: Tensor, sparsity: float) -> None:
    weight, hessian = linear.weight.float().clone(), moments.clone()  # [out, in], [in, in]
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(DAMPENING * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for first in range(0, weight.shape[1], COLUMNS):
        last = min(first + COLUMNS, weight.shape[1])
        scores = weight[:, first:last].square() / factor.diagonal()[first:last].square()
        gone = torch.zeros_like(scores, dtype=torch.bool)
        gone.view(-1)[scores.flatten().argsort(stable=True)[: round(sparsity * scores.numel())]] = True
        errors = torch.zeros_like(scores)
        for column in range(first, last):
            here = weight[:, column]
            errors[:, column - first] = torch.where(gone[:, column - first], here, 0) / factor[column, column]
            weight[:, column:last] -= errors[:, column - first, None] * factor[column, column:last]
            weight[:, column].masked_fill_(gone[:, column - first], 0)
        weight[:, last:] -= errors @ factor[first:last, last:]
    linear.weight.copy_(weight)


RULES = {"wanda": _wanda, "sparsegpt": _sparsegpt}
