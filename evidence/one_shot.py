"""Two outside references for one-shot unstructured pruning: Wanda, and pruning in the style of SparseGPT.

Wanda (Sun et al., 2023, arXiv 2306.11695): in each row of a linear the weights with the smallest |w| times the norm of
their input go. SparseGPT (Frantar, Alistarh, 2023, arXiv 2301.00774): blocks of columns lose the weights with the
smallest w^2 / [H^-1]_jj^2 (Cholesky factor), and the later columns are corrected. Both go block by block, each on the
outputs of the pruned blocks before it. Zeros save neither bytes nor time here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from leanformers.methods import Subject
from leanformers.training.blockwise import Blocks
from leanformers.training.streaming import Held, hold

COLUMNS, DAMPENING = 128, 0.01


@torch.no_grad()
def prune(subject: Subject, rule: str, sparsity: float, samples: int) -> None:
    """Set a share of each linear of the blocks to zero, by ``rule``: "wanda" or "sparsegpt"."""
    anatomy = subject.anatomy
    subject.model.eval()
    blocks = Blocks(anatomy, lambda batch: subject.task.forward(subject.model, batch))
    held = hold(blocks, subject.calibration(samples, batch_size=8))
    for index, module in enumerate(blocks.modules):
        linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
        seen = _second_moments(linears, held, index)
        for name, linear in linears.items():
            RULES[rule](linear, seen[name], sparsity)
        for one in held:
            one.states = one.run(index)


def _second_moments(linears: Mapping[str, nn.Module], held: Sequence[Held], index: int) -> dict[str, Tensor]:
    """Sum over real tokens of x x^T of each linear's inputs: [in, in], float32."""
    seen: dict[str, Tensor] = {}
    for one in held:
        for name, x in zip(linears, one.watch(index, inputs=list(linears.values())), strict=True):
            rows = one.tokens(x).float()
            seen[name] = seen.get(name, 0) + rows.t() @ rows
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
