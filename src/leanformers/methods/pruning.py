"""What methods that zero single weights share: which weights there are, one threshold over all, and the masks.

Scores are not negative and float32. A threshold is found by counting, so that ties are split exactly and neither the
pool nor a sorted copy of it is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from leanformers.anatomy import Anatomy, is_dense
from leanformers.errors import LeanError
from leanformers.methods.subject import Subject
from leanformers.parts.masked import MaskedLinear
from leanformers.surgery import MaskWeights

Scores = Callable[[], Iterable[tuple[str, Tensor]]]


def prunable(anatomy: Anatomy) -> list[tuple[str, Tensor]]:
    """Path and weight [out, in] of every float linear of the blocks, fused ones whole."""
    found = []
    for path, projection in anatomy.linears().items():
        if is_dense(projection.module):
            weight = projection.weight()
            if not weight.is_floating_point():
                raise LeanError(f"{path} holds {weight.dtype} weights: load the model unquantised to mask it.")
            found.append((path, weight))
    return found


def weight_of(subject: Subject, path: str) -> Tensor:
    """The weight [out, in] of one linear of the blocks as it is now. A list of all would keep those that are masked."""
    return subject.anatomy.linears()[path].weight()


def drop_smallest(score: Tensor, count: int) -> Tensor:
    """Bool mask of the scores' shape, false at the ``count`` smallest; equal ones go in order of position."""
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    flat = score.flatten()
    threshold = flat.kthvalue(count).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero()[:, 0]
    mask[ties[count - int((flat < threshold).sum()) :]] = True
    return mask.view(score.shape)


def global_counts(scores: Scores, total: int) -> dict[str, int]:
    """How many of the ``total`` smallest scores lie in each tensor.

    ``scores()`` iterates (name, non-negative tensor) anew at each call, three times in all, and one tensor's scores
    are held at a time: the upper half of the threshold's bits comes from a histogram of upper halves, the lower half
    from one of those that share it. What ties at the threshold is taken in the order of the tensors.
    """
    upper, before = _bin(scores, total, 0, lambda bits: bits >> 16)  # bits of non-negative floats sort like the numbers
    lower, _ = _bin(scores, total, before, lambda bits: bits[bits >> 16 == upper] & 0xFFFF)
    threshold = upper << 16 | lower
    found = {name: (_at_most(score, threshold - 1), _at_most(score, threshold)) for name, score in scores()}
    left = total - sum(below for below, _ in found.values())
    counts = {}
    for name, (below, at_most) in found.items():
        ties = min(left, at_most - below)
        counts[name], left = below + ties, left - ties
    return counts


def _bin(scores: Scores, total: int, before: int, half: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """The first value of a half at which ``total`` scores are counted, and how many are counted below it."""
    counted = torch.zeros(1 << 16, dtype=torch.int64)
    for _, score in scores():
        counted += torch.bincount(half(score.view(torch.int32).flatten()), minlength=1 << 16).cpu()
    up_to = before + counted.cumsum(0)
    place = min(int((up_to < total).sum()), len(up_to) - 1)
    return place, int(up_to[place - 1]) if place else before


def _at_most(score: Tensor, bits: int) -> int:
    return int((score.view(torch.int32) <= bits).sum()) if bits >= 0 else 0


def mask_of(module: torch.nn.Module) -> Tensor | None:
    """The mask [out, in] that a linear already has, None for a plain one."""
    return module.mask if isinstance(module, MaskedLinear) else None


def hold(subject: Subject, path: str, mask: Tensor) -> None:
    """Zero the linear at ``path`` where the mask is false and keep it so; an unstructured mask is drawn closer."""
    module = subject.anatomy.module(path)
    if isinstance(module, MaskedLinear) and module.pattern == "unstructured":
        module.set_mask(mask)
    else:
        subject.apply(MaskWeights(path=path), mask=mask)
