"""Sparse coefficients over dense dictionaries: W in blocks of inputs, each about S D with few non-zeros in a row of S.

The start of a dense-sparse linear (card dsformer): orthogonal matching pursuit picks the atoms of a row one by one,
least squares gives the dictionary for them, in turns; the best of all turns is kept. Blocks are independent, so that
they are done a few at a time and the coefficients are never all dense at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 1 << 24  # dense coefficients of the blocks that are worked on together
_RIDGE = 1e-6


class Factors(NamedTuple):
    """W[:, block b] ~ sum over t of values[:, b, t] * dictionary[b, indices[:, b, t]]."""

    dictionary: Tensor  # [blocks, rank, width], atoms of unit norm
    values: Tensor  # [out, blocks, nonzeros]
    indices: Tensor  # int64 of the same shape, rising along the last axis


def blocks_of(weight: Tensor, width: int) -> Tensor:
    """[out, in] -> [in / width, out, width], a view."""
    return weight.unflatten(1, (-1, width)).transpose(0, 1)


@torch.no_grad()
def factorise(weight: Tensor, width: int, rank: int, nonzeros: int, *, iterations: int = 15) -> Factors:
    """The factors of a weight [out, in], float32. Deterministic: a dictionary starts at the rows of largest norm."""
    blocks = blocks_of(weight.detach().float(), width)  # [blocks, out, width]
    size = max(1, _CHUNK // (blocks.shape[1] * rank))
    parts = [_alternate(part, rank, nonzeros, iterations) for part in blocks.split(size)]
    dictionary, values, indices = (torch.cat(each) for each in zip(*parts, strict=True))
    order = indices.argsort(-1)
    values, indices = values.gather(-1, order), indices.gather(-1, order)
    return Factors(dictionary, values.transpose(0, 1).contiguous(), indices.transpose(0, 1).contiguous())


@torch.no_grad()
def ridge(weight: Tensor, dictionary: Tensor) -> Tensor:
    """Dense coefficients [blocks, out, rank] by ridge regression of a weight [out, in] on all atoms."""
    blocks = blocks_of(weight.detach().float(), dictionary.shape[-1])
    atoms = dictionary.float()
    gram = atoms @ atoms.mT  # [blocks, rank, rank]
    gram.diagonal(dim1=1, dim2=2).add_(1e-2 * gram.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True))
    return torch.linalg.solve(gram, atoms @ blocks.mT).mT


def pursue(blocks: Tensor, dictionary: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit of every row over atoms of unit norm: values and indices [blocks, out, nonzeros].

    The picked atoms of a row are made orthogonal as they come, so that the residual is that of least squares.
    """
    residual = blocks.clone()  # [blocks, out, width]
    correlations = blocks @ dictionary.mT  # [blocks, out, rank]
    taken = torch.zeros_like(correlations, dtype=torch.bool)
    axes: list[Tensor] = []  # orthonormal, [blocks, out, width] each
    picks: list[Tensor] = []
    for _ in range(nonzeros):
        pick = (residual @ dictionary.mT).abs().masked_fill(taken, -1).argmax(-1)  # [blocks, out]
        taken.scatter_(-1, pick[..., None], True)
        axis = _rows(dictionary, pick)
        for _ in range(2):  # twice: once loses orthogonality to rounding
            for other in axes:
                axis = axis - (axis * other).sum(-1, keepdim=True) * other
        norm = axis.norm(dim=-1, keepdim=True)
        axis = torch.where(
            norm > 1e-4, axis / norm.clamp_min(1e-4), 0
        )  # an atom in the span of the others adds nothing
        residual -= (residual * axis).sum(-1, keepdim=True) * axis
        axes.append(axis)
        picks.append(pick)
    indices = torch.stack(picks, -1)
    return _least_squares(correlations, dictionary, indices), indices


def _least_squares(correlations: Tensor, dictionary: Tensor, indices: Tensor) -> Tensor:
    """The coefficients [blocks, out, nonzeros] of the picked atoms."""
    rank, count = dictionary.shape[1], indices.shape[-1]
    pairs = indices[..., :, None] * rank + indices[..., None, :]  # [blocks, out, nonzeros, nonzeros]
    gram = (dictionary @ dictionary.mT).flatten(1)  # [blocks, rank * rank]
    inner = gram.gather(1, pairs.flatten(1)).view(*indices.shape, count)
    inner.diagonal(dim1=-2, dim2=-1).add_(_RIDGE)
    solved: Tensor = torch.linalg.solve(inner, correlations.gather(-1, indices)[..., None])
    return solved[..., 0]


def _rows(dictionary: Tensor, pick: Tensor) -> Tensor:
    """Atoms [blocks, out, width] by number [blocks, out]."""
    return dictionary.gather(1, pick[..., None].expand(-1, -1, dictionary.shape[-1]))


def _alternate(blocks: Tensor, rank: int, nonzeros: int, iterations: int) -> Factors:
    order = blocks.norm(dim=-1).argsort(dim=-1, descending=True, stable=True)[:, :rank]
    dictionary = _unit(_rows(blocks, order))
    if dictionary.shape[1] < rank:  # more atoms than rows
        rest = torch.eye(blocks.shape[-1]).to(blocks)[torch.arange(rank - dictionary.shape[1]) % blocks.shape[-1]]
        dictionary = torch.cat([dictionary, rest.expand(len(blocks), -1, -1)], 1)
    best = now = Factors(dictionary, *pursue(blocks, dictionary, nonzeros))
    least = _errors(blocks, now)
    for _ in range(iterations):
        dictionary = _dictionary_step(blocks, now)
        now = Factors(dictionary, *pursue(blocks, dictionary, nonzeros))
        error = _errors(blocks, now)
        better = (error < least)[:, None, None]
        best = Factors(*(torch.where(better, new, old) for new, old in zip(now, best, strict=True)))
        least = torch.minimum(error, least)
    return best


def _dictionary_step(blocks: Tensor, factors: Factors) -> Tensor:
    """Least squares for the atoms, then unit norm; what no row uses becomes a row that is fitted worst."""
    dense = _dense(factors)
    gram = dense.mT @ dense  # [blocks, rank, rank]
    gram.diagonal(dim1=1, dim2=2).add_(_RIDGE * gram.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp_min(1e-30))
    atoms = torch.linalg.solve(gram, dense.mT @ blocks)
    unused = dense.abs().sum(1) == 0  # [blocks, rank]
    worst = (blocks - dense @ atoms).square().sum(-1).argsort(dim=-1, descending=True, stable=True)  # [blocks, out]
    turn = (unused.cumsum(1) - 1).clamp_min(0) % blocks.shape[1]
    return _unit(torch.where(unused[..., None], _rows(blocks, worst.gather(1, turn)), atoms))


def _dense(factors: Factors) -> Tensor:
    """Coefficients [blocks, out, rank] from values and indices [blocks, out, nonzeros]."""
    dictionary, values, indices = factors
    return values.new_zeros(*values.shape[:2], dictionary.shape[1]).scatter_(-1, indices, values)


def _errors(blocks: Tensor, factors: Factors) -> Tensor:
    """Squared error of each block, [blocks]."""
    return (blocks - _dense(factors) @ factors.dictionary).square().sum((1, 2))


def _unit(atoms: Tensor) -> Tensor:
    return atoms / atoms.norm(dim=-1, keepdim=True).clamp_min(1e-12)
