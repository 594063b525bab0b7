"""The metrics, as functions of tensors; each returns a float."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 1024  # queries compared at once


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of equal entries; both [examples]."""
    return (predicted == labels).double().mean().item()


def macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """Mean F1 over the classes that occur in either; both [examples]."""
    scores = []
    for label in torch.cat([predicted, labels]).unique():
        hits = ((predicted == label) & (labels == label)).sum().item()
        scores.append(2 * hits / ((predicted == label).sum().item() + (labels == label).sum().item()))
    return sum(scores) / len(scores)


def spearman(predicted: Tensor, target: Tensor) -> float:
    """Correlation of the ranks, ties sharing their mean; both [examples]; 0 where one is constant."""
    a, b = (ranks(x) for x in (predicted, target))
    a, b = a - a.mean(), b - b.mean()
    scale = (a.norm() * b.norm()).item()
    return (a @ b).item() / scale if scale else 0.0


def ranks(values: Tensor) -> Tensor:
    """Rank of each value, from 0, float64 [examples]; equal values share the mean of their ranks."""
    _, inverse, counts = values.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() + 1) / 2)[inverse]


def ndcg(queries: Tensor, bodies: Tensor, relevant: Tensor | None = None, k: int = 10) -> float:
    """Mean nDCG@k with one relevant body per query: 1 / log2(1 + rank), 0 beyond rank k.

    Bodies that score the same as the relevant one are placed before it, so a collapsed model earns nothing.

    Args:
        queries: [queries, dim]. bodies: [bodies, dim]. relevant: index of the right body, [queries]; None:
            the same row.
    """
    if relevant is None:
        relevant = torch.arange(len(queries))
    total = 0.0
    for start in range(0, len(queries), _CHUNK):
        scores = queries[start : start + _CHUNK] @ bodies.T  # [chunk, bodies]
        own = scores.gather(1, relevant[start : start + _CHUNK, None])
        rank = (scores >= own).sum(1)  # [chunk], the relevant body included: from 1
        gain = 1 / torch.log2(1 + rank.double())
        total += gain[rank <= k].sum().item()
    return total / len(queries)


def neighbours(vectors: Tensor, reference: Tensor, k: int = 10) -> float:
    """Share of each text's k nearest neighbours by `reference` that are also nearest by `vectors`.

    Both [texts, dim of their own], normalised; a text is no neighbour of itself.
    """
    k = min(k, len(vectors) - 1)
    if k < 1:
        return 1.0
    shared = 0
    for start in range(0, len(vectors), _CHUNK):
        near = []
        for side in (vectors, reference):
            scores = side[start : start + _CHUNK] @ side.T  # [chunk, texts]
            rows = torch.arange(len(scores))
            scores[rows, rows + start] = -math.inf
            near.append(scores.topk(k).indices)
        shared += int((near[0][:, :, None] == near[1][:, None, :]).sum())
    return shared / (k * len(vectors))
