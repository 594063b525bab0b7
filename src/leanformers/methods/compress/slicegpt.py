"""SliceGPT: rotate the residual stream to its principal axes and drop the weakest, everywhere in the model.

Source: Ashkboos, Croci, do Nascimento, Hoefler, Hensman (ICLR 2024, arXiv 2401.15024). A pre-norm model whose norms'
gains are folded into the linears behind them does not change when its stream is rotated. So each position of the
stream gets the principal axes of its own signal on calibration text (no mean subtracted), the weakest are sliced away,
and each residual connection carries a shortcut from one basis to the next. Positions are taken in the order of
computation, so that later axes see the error that slicing made before them. No gradients.
Deviations: the stream before the head is sliced like the rest (the reference does not slice it by default, which stock
block code could not add up); the reference's damping of the covariance is left out, since it moves all eigenvalues
alike and no axis; the calibration text is the task's own. Recovery by LoRA is a step of its own (`lora`).
Cost: two passes over each block and, per position, an eigendecomposition of a hidden_size x hidden_size matrix in
float64; one block's activations. What is saved is less than ``slice``: every position keeps a shortcut of size^2, and
a tied head gets a weight of its own, which makes small models with large vocabularies larger at first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.methods.base import Choice, Range, Saving, Subject, method, setting
from leanformers.surgery import SliceResidual
from leanformers.surgery.rotation import Sublayer, centred, refuse, steps, writer
from leanformers.training.blockwise import Blocks
from leanformers.training.progress import bar
from leanformers.training.streaming import Held, hold

Axes = Callable[[Tensor], Tensor]
"""From the second moment [hidden_size, hidden_size] of a signal to its orthonormal axes, those that stay first."""


@method("slicegpt", stock=False, stage="structure", order=18, needs=("calibration",), paper="Ashkboos et al. (2024)")
@dataclass(frozen=True, kw_only=True)
class SliceGPT:
    """Slice the residual stream along its principal axes."""

    slice: float = setting(0.25, low=0.0, high=0.99, help="share of the hidden size that goes")
    multiple: int = setting(8, low=1, help="the size that stays is rounded down to a multiple of this")
    orientation: Literal["random", "pca"] = setting(
        "random", help="of the axes that stay: turned at random, so that no number format meets a few large values"
    )
    samples: int = setting(128, low=1, help="calibration texts")
    batch_size: int = setting(8, low=1, help="of them at a time")
    tokens: int | None = setting(None, low=1, help="at most, of those texts together")

    def size(self, hidden_size: int) -> int:
        """Dimensions that stay of ``hidden_size``."""
        return hidden_size if self.slice == 0 else int((1 - self.slice) * hidden_size) // self.multiple * self.multiple

    def __call__(self, subject: Subject) -> None:
        anatomy: Anatomy = subject.anatomy
        size, before = self.size(anatomy.hidden_size), _counts(anatomy)
        generator = torch.Generator().manual_seed(subject.seed)

        def axes(moment: Tensor) -> Tensor:
            found = principal(moment)
            return found if self.orientation == "pca" else turned(found, size, generator)

        slice_along(subject, size, axes, _texts(subject, self))
        after = _counts(subject.anatomy)
        subject.notes["slicegpt"] = {
            "hidden_size": size,
            "parameters, share of the model as given": after[0] / before[0],
            "parameters of the layers, share": after[1] / before[1],
        }

    def refuses(self, anatomy: Anatomy, task: Any) -> str | None:
        if anatomy.reduces_tokens:
            return "it drops tokens in its layers; reduce tokens last"
        if self.size(anatomy.hidden_size) < 8:
            return f"slice {self.slice} leaves fewer than 8 of its {anatomy.hidden_size} dimensions; take a smaller one"
        try:
            refuse(anatomy)
        except LeanError as error:
            return str(error).rstrip(".")
        return None

    def estimate(self, anatomy: Anatomy, length: int = 128) -> Saving:
        cost = SliceResidual(size=self.size(anatomy.hidden_size), rotated=True).cost(anatomy)
        return Saving(parameters=cost.parameters, flops=cost.flops(length))

    @classmethod
    def space(cls) -> dict[str, Choice | Range]:
        return {"slice": Choice((0.1, 0.2, 0.3)), "samples": Choice((16,)), "tokens": Choice((4096,))}

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return [{"slice": 0.2, "samples": 16, "tokens": 4096}]


def slice_along(subject: Subject, size: int, axes: Axes, batches: Sequence[dict[str, Tensor]]) -> None:
    """Rotate and slice the subject's model, with axes chosen from the signal at each position.

    axes: called position by position, with the second moment of the signal as the model sliced so far makes it.
    """
    anatomy = subject.anatomy
    subject.model.eval()
    blocks = Blocks(anatomy, lambda batch: subject.task.forward(subject.model, batch))
    edit = SliceResidual(size=size, rotated=True)
    edit.cost(anatomy)  # refuses before any work
    held = hold(blocks, batches)
    with bar(subject.progress, "slicing", len(list(steps(anatomy)))) as advance:
        subject.apply(edit, rotations=_rotations(anatomy, size, axes, held, advance))


@torch.no_grad()
def _rotations(
    anatomy: Anatomy, size: int, axes: Axes, held: list[Held], advance: Callable[..., Any]
) -> Iterator[Tensor]:
    """The first ``size`` axes of each position; surgery has turned and sliced all before it when it asks for them."""
    final, indices = anatomy.final_norms[0], {id(layer): index for index, layer in enumerate(anatomy.layers)}
    width, dtype = anatomy.hidden_size, held[0].states.dtype
    groups = list(steps(anatomy))
    moment = _Moment(width)
    for one in held:
        one.states = centred(one.states.float(), final)
        moment.add(one, one.states)
    basis = axes(moment.total)[:, :size]
    yield basis
    for one in held:
        one.states = (one.states @ basis.float()).to(dtype)
    for place, (layer, group) in enumerate(groups):
        last = place + 1 == len(groups) or groups[place + 1][0] is not layer
        moment = _Moment(width)
        for one in held:
            signal = _after(anatomy, one, indices[id(layer)], group, basis)
            moment.add(one, signal)
            if last:
                one.states = signal  # [batch, length, hidden_size], sliced when the axes are known
        basis = axes(moment.total)[:, :size]
        advance(1)
        yield basis
        if last and place + 1 < len(groups):
            for one in held:
                one.states = (one.states @ basis.float()).to(dtype)


def _after(anatomy: Anatomy, one: Held, index: int, group: list[tuple[Any, Sublayer]], basis: Tensor) -> Tensor:
    """The stream behind a place in the basis of the model as given, float32 [batch, length, hidden_size].

    The norms before the place have their final form, the writers do not yet: their outputs are as wide as they were.
    """
    before = anatomy.module(group[0][0].path)
    stream, *added = one.watch(index, inputs=[before], outputs=[writer(part).module for _, part in group])
    signal = stream.float() @ basis.t().to(stream.device, torch.float32)
    for (norm, _), output in zip(group, added, strict=True):
        signal += centred(output.float(), norm)
    return signal.view(*one.states.shape[:2], -1)  # OPT's feed-forward sees the batch's tokens in one row


class _Moment:
    """sum x^T x over the real tokens, in float64."""

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64)

    def add(self, one: Held, states: Tensor) -> None:
        rows = one.tokens(states).double()  # [tokens, hidden_size]
        self.total = self.total.to(rows.device)
        self.total += rows.t() @ rows


def principal(moment: Tensor) -> Tensor:
    """Eigenvectors by falling eigenvalue, as columns [hidden_size, hidden_size]."""
    return torch.linalg.eigh(moment).eigenvectors.flip(-1)


def turned(axes: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """The first ``size`` axes turned among themselves at random: the same subspace."""
    square = torch.randn(size, size, dtype=axes.dtype, generator=generator)
    return axes[:, :size] @ torch.linalg.qr(square).Q.to(axes.device)


def _texts(subject: Subject, settings: SliceGPT) -> list[dict[str, Tensor]]:
    """Calibration batches, one at least, of no more tokens than wanted together.

    Raises:
        LeanError: the texts together are shorter than one sequence of the task.
    """
    taken: list[dict[str, Tensor]] = []
    seen = 0
    for batch in subject.calibration(settings.samples, batch_size=settings.batch_size):
        mask = batch.get("attention_mask")
        count = int(mask.sum()) if mask is not None else next(iter(batch.values())).shape[:2].numel()
        if taken and settings.tokens is not None and seen + count > settings.tokens:
            break
        taken.append(batch)
        seen += count
    subject.check_calibration("slicegpt", taken)
    return taken


def _counts(anatomy: Anatomy) -> tuple[int, int]:
    """Parameters of the model (tied ones once) and of its layers."""
    layers = sum(parameter.numel() for layer in anatomy.layers for parameter in layer.module.parameters())
    return anatomy.parameters(), layers
