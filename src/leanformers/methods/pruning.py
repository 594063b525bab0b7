"""What methods that zero single weights share: which weights there are, one threshold over all, and the masks.

Scores are not negative and float32. A threshold is found by bisection, so that ties are split exactly and no sorted
copy of the pool is made.
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


def drop_smallest(score: Tensor, count: int) -> Tensor:
    """Bool mask of the scores' shape, false at the ``count`` smallest; equal ones go in order of position."""
    order = score.flatten().argsort(stable=True)
    mask = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
    mask[order[:count]] = False
    return mask.view(score.shape)


def global_counts(scores: Scores, total: int) -> dict[str, int]:
    """How many of the ``total`` smallest scores lie in each tensor.

    ``scores()`` iterates (name, non-negative tensor) anew at each call. The threshold is found by bisection on the
    float's bits, so that no more than one tensor's scores are held at a time; what ties at the threshold is
    taken in the order of the tensors.
    """
    low, high = 0, 0x7F800000  # bit patterns of non-negative float32 sort like the numbers
    while low < high:  # the smallest bit pattern with at least `total` scores at or below it
        middle = (low + high) // 2
        if sum(_at_most(score, middle) for _, score in scores()) >= total:
            high = middle
        else:
            low = middle + 1
    below = {name: _at_most(score, low - 1) for name, score in scores()}
    left = total - sum(below.values())
    counts = {}
    for name, score in scores():
        ties = min(left, _at_most(score, low) - below[name]) if left > 0 else 0
        counts[name], left = below[name] + ties, left - ties
    return counts


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
