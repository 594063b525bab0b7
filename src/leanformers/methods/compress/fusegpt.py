"""FuseGPT: blocks are removed one by one, and each is first injected into its neighbours, which learn to use it.

Source: Pei et al. (2024, arXiv 2411.14507). Each round takes out the block without which the output of the last one
turns least (Macro Influence, measured on the model as fused so far). In the group of blocks around it, every linear
W becomes W + B A + sum_k (C_k D_k) * W_k, elementwise, W_k being the same linear of a removed block; C = B = 0, so
nothing changes at first. The group learns to give back what it gave with the removed block. At the end all is folded
into plain linears: the result is a stock checkpoint with fewer blocks.
Deviations: the loss is a softmax over the hidden axis, not across the sequences of a batch as in the reference code
(``loss="kl_dim0"`` is that). Where one coordinate dominates the stream of a token, as in the middle of some decoders,
that softmax saturates and says little: compare ``mse``. Sequences may be padded, padding counts nowhere. Norms and
coefficients train in float32 beside the frozen weights, whatever the model's dtype; injections beyond four of one
linear are folded early.
Cost: scoring n^2 / 2 block passes per round (prefixes are shared), training 3 (group - 1) passes per token and epoch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.methods.base import Choice, Range, Saving, Subject, method, setting
from leanformers.surgery import Cost, DropLayers
from leanformers.training.blockwise import Blocks, reconstruct
from leanformers.training.injection import Injected, unlike
from leanformers.training.progress import bar

_log = logging.getLogger(__name__)

_BRIEF = {
    "rank": 16,
    "adapter_rank": 16,
    "samples": 8,
    "score_samples": 2,
    "length": 64,
    "batch_size": 2,
    "epochs": 2,
}
"""For a search: a round then takes about as long as the short training of an estimate."""


@method("fusegpt", stage="structure", order=5, needs=("calibration",), paper="Pei et al. (2024)")
@dataclass(frozen=True, kw_only=True)
class FuseGPT:
    """Remove blocks after fusing them into their neighbours."""

    sparsity: float = setting(0.25, low=0.0, high=0.99, help="share of the blocks that goes, rounded up")
    group: int = setting(8, low=2, help="consecutive blocks that share a removed one, itself included")
    rank: int = setting(128, low=0, help="of the coefficients C D; 0 injects nothing")
    adapter_rank: int = setting(128, low=0, help="of the additional update B A of a block's own linears")
    samples: int = setting(128, low=1, help="calibration sequences that the groups train on")
    score_samples: int = setting(32, low=1, help="of these, the first ones that score the blocks")
    length: int | None = setting(None, low=1, help="tokens of a sequence at most; none: as the task gives them")
    batch_size: int = setting(8, low=1, help="sequences of a batch")
    epochs: int = setting(20, low=0, help="of each group's training; 0 deletes blocks without a trace")
    learning_rate: float = setting(1e-3, low=0.0, help="of the coefficients and the injected biases")
    adapter_learning_rate: float = setting(9.65e-6, low=0.0, help="of B A and the norms")
    loss: Literal["kl", "kl_dim0", "mse"] = setting("kl", help="between the group's outputs with and without the block")

    def __post_init__(self) -> None:
        if self.loss == "kl_dim0" and self.batch_size < 2:
            raise ValueError("the loss kl_dim0 compares the sequences of a batch: set batch_size to 2 or more")

    def __call__(self, subject: Subject) -> None:
        if gone := self._gone(subject.anatomy):
            fusion = Fusion(subject, self)
            for _ in range(gone):
                fusion.round()
            fusion.finish()

    def _gone(self, anatomy: Anatomy) -> int:
        return math.ceil(round(anatomy.num_hidden_layers * self.sparsity, 6))

    def refuses(self, anatomy: Anatomy, task: Any) -> str | None:
        if len(anatomy.stacks) > 1:
            return "it fuses the blocks of a single stack, and this one has an encoder and a decoder"
        if anatomy.reduces_tokens:
            return "it drops tokens in its layers; reduce tokens last"
        count, gone = anatomy.num_hidden_layers, self._gone(anatomy)
        if gone > count - 1:
            return f"a sparsity of {self.sparsity} takes {gone} of its {count} blocks; lower it to leave at least one"
        try:
            self._cost(anatomy)
        except LeanError as error:
            return str(error).rstrip(".")
        return unlike(anatomy) if gone else None

    def _cost(self, anatomy: Anatomy) -> Cost:
        # Which blocks go is not known, and they are all alike.
        return DropLayers(keep=tuple(range(anatomy.num_hidden_layers - self._gone(anatomy)))).cost(anatomy)

    def estimate(self, anatomy: Anatomy, length: int = 128) -> Saving:
        cost = self._cost(anatomy)
        return Saving(parameters=cost.parameters, flops=cost.flops(length))

    @classmethod
    def space(cls) -> dict[str, Choice | Range]:
        return {"sparsity": Choice((0.1, 0.2, 0.3)), **{name: Choice((value,)) for name, value in _BRIEF.items()}}

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return [{"sparsity": 0.1, **_BRIEF}]


@dataclass
class Round:
    """What one removal did: the block (its index in the original model), every block's influence, the losses of
    the group's training by epoch, and how many numbers it trained."""

    removed: int
    group: list[int]
    influence: dict[int, float]
    losses: list[float] = field(default_factory=list)
    trained: int = 0


class Fusion:
    """The rounds on one model. Blocks keep their original indices, and the model its blocks, until the end."""

    def __init__(self, subject: Subject, settings: FuseGPT) -> None:
        self.subject, self.settings = subject, settings
        self.anatomy: Anatomy = subject.anatomy
        self.alive = list(range(self.anatomy.num_hidden_layers))
        self.rounds: list[Round] = []
        self.injected: dict[int, Injected] = {}
        self.generator = torch.Generator().manual_seed(subject.seed)
        self.batches = self._calibration()
        subject.model.eval()
        _warn(self.anatomy)
        self.blocks = Blocks(self.anatomy, lambda batch: subject.task.forward(subject.model, batch))

    def finish(self) -> None:
        """Fold what was injected into the blocks that are left, and write the edit."""
        for part in self.injected.values():
            part.fold()
        self.subject.apply(DropLayers(keep=tuple(self.alive)))
        self.subject.notes["fusegpt"] = [{"removed": one.removed, "losses": one.losses} for one in self.rounds]

    def round(self) -> Round:
        """Steps 1 to 5: score, choose the group, record it, inject, train."""
        influence = self.influence()
        victim = min(self.alive, key=lambda block: (influence[block], block))
        members = window(self.alive, victim, self.settings.group)
        done = Round(removed=victim, group=members, influence=influence)
        survivors = [block for block in members if block != victim]
        if self.settings.epochs and survivors:
            recorded = self._record(members)
            self._inject(victim, survivors)
            self._train(done, survivors, *recorded)
        self.alive.remove(victim)
        self.injected.pop(victim, None)
        self.rounds.append(done)
        return done

    # -- 1: Macro Influence ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def influence(self) -> dict[int, float]:
        """1 - cosine of the last block's output with and without each block, averaged over the real tokens."""
        total, tokens = dict.fromkeys(self.alive, 0.0), 0
        batches = self.batches[: -(-self.settings.score_samples // self.settings.batch_size)]
        with bar(self.subject.progress, "influence", len(batches) * len(self.alive)) as advance:
            for batch in batches:
                start = self.blocks.start(batch)
                whole = self._through(self.alive, start.hidden_states, start)
                mask = self.blocks.real(batch, whole)
                real = whole.float() if mask is None else whole[mask].float()
                tokens += real[..., 0].numel()
                prefix = start.hidden_states
                for place, block in enumerate(self.alive):
                    without = self._through(self.alive[place + 1 :], prefix, start).to(whole.device)
                    without = without.float() if mask is None else without[mask].float()
                    total[block] += float(torch.cosine_similarity(real, without, dim=-1).double().sum())
                    prefix = self._through([block], prefix, start)
                    advance()
        return {block: 1 - total[block] / tokens for block in self.alive}

    # -- 3 to 5: the group -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _record(self, members: Sequence[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """The group's inputs, outputs (with the block that goes) and masks, a batch each, on the CPU."""
        inputs, targets, masks = [], [], []
        before = self.alive[: self.alive.index(members[0])]
        for batch in self.batches:
            start = self.blocks.start(batch)
            hidden_states = self._through(before, start.hidden_states, start)
            inputs.append(hidden_states.cpu())
            targets.append(self._through(members, hidden_states, start).cpu())
            masks.append(self.blocks.real(batch, hidden_states))
        return inputs, targets, masks

    def _inject(self, victim: int, survivors: Sequence[int]) -> None:
        layers = self.anatomy.layers
        if victim in self.injected:
            self.injected[victim].fold()
        for block in survivors:
            if block not in self.injected:
                self.injected[block] = Injected(layers[block], self.settings.adapter_rank, self.generator)
            if self.settings.rank:
                self.injected[block].inject(layers[victim].module, self.settings.rank)

    def _train(self, done: Round, survivors: Sequence[int], inputs: Any, targets: Any, masks: Any) -> None:
        def forward(index: int, hidden_states: Tensor) -> Tensor:
            return self._through(survivors, hidden_states, self.blocks.start(self.batches[index]))

        parts = [self.injected[block] for block in survivors]
        coefficients = [tensor for part in parts for tensor in part.coefficients()]
        adapters = [tensor for part in parts for tensor in part.adapters()]
        done.trained = sum(tensor.numel() for tensor in coefficients + adapters)
        done.losses = reconstruct(
            forward,
            inputs,
            targets,
            [
                {"params": coefficients, "lr": self.settings.learning_rate},
                {"params": adapters, "lr": self.settings.adapter_learning_rate},
            ],
            epochs=self.settings.epochs,
            loss=self.settings.loss,
            masks=masks,
            betas=(0.9, 0.95),
            seed=self.subject.seed,
            progress=self.subject.progress,
            label="group",
        )

    # -- running blocks --------------------------------------------------------------------------------------------

    def _through(self, blocks: Sequence[int], hidden_states: Tensor, start: Any) -> Tensor:
        for block in blocks:
            part = self.injected.get(block)
            tensors = part.effective() if part is not None else None
            hidden_states = start.run(block, hidden_states, tensors)
        return hidden_states

    def _calibration(self) -> list[dict[str, Tensor]]:
        size, length = self.settings.batch_size, self.settings.length
        batches = []
        for batch in self.subject.calibration(self.settings.samples, batch_size=size):
            batches.append({name: value[:, :length] if value.ndim == 2 else value for name, value in batch.items()})
            if len(batches) * size >= self.settings.samples:
                break
        if not batches:
            raise LeanError("method 'fusegpt': the task has no training texts to calibrate on; give it some.")
        self.subject.check_calibration("fusegpt", batches, length)
        return batches


def window(alive: Sequence[int], victim: int, size: int) -> list[int]:
    """``size`` consecutive blocks of ``alive`` with ``victim`` in their middle, shifted where the model ends."""
    if size > len(alive):
        _log.warning("The group of %d blocks is shrunk to the %d that are left.", size, len(alive))
        size = len(alive)
    first = min(max(alive.index(victim) - size // 2, 0), len(alive) - size)
    return list(alive[first : first + size])


def _warn(anatomy: Anatomy) -> None:
    types = set(getattr(anatomy.config, "layer_types", None) or ())
    if len(types) > 1:
        _log.warning("The blocks differ in attention (%s): one injected into another changes its role.", types)
