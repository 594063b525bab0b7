"""AxFormer: remove what a fine-tuned model's validation loss is better off without, greedily and without retraining.

Source: Nagarajan, Sen, Stevens, Raghunathan (2020/2022, arXiv 2010.03688 v2) and their code. A change is kept if the
mean loss on validation rows falls below the lowest so far and more than N rows are no worse than under the model as it
came. First hard attention (only the K largest probabilities of a row stay, not renormalised) is tried in each block,
bottom to top; then, top to bottom, each feed-forward and each attention is tried without, and looked into (groups of
neurons, heads) where its loss stayed within a factor of the lowest. Weights never change.
Choices: N is a share of the rows; the mean is over rows, whatever the batches; of a language model a row is a sequence
with its mean token loss. With grouped queries a head is a key/value head with its query heads. A sub-layer that is
looked into keeps one head or one group, and the model one sub-layer. Left out: training the structure that was found.
Cost: one pass over the validation rows per trial, 3 per block and one per head and group; the blocks below the one in
hand are not run again, for which the rows' activations there are held. Top-K attention saves nothing in PyTorch: FLOPs
fall by what is removed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from leanformers.anatomy import Anatomy, Attention, is_dense, is_linear
from leanformers.errors import LeanError
from leanformers.methods.base import Choice, Range, Subject, method, setting
from leanformers.methods.switches import LowerLayers, Switch, Switches
from leanformers.parts.linear import LowRankLinear

_FEW = 50  # validation rows below which the rule decides by chance
_FREE = "unstructured"  # the pattern of a mask that any cut leaves whole
_log = logging.getLogger(__name__)


@method("axformer", stock=False, stage="structure", order=20, needs=("labels",), paper="Nagarajan et al. (2022)")
@dataclass(frozen=True, kw_only=True)
class AxFormer:
    """Remove sub-layers, heads and neurons as long as the validation loss falls."""

    k: int | None = setting(30, low=1, help="keys that hard attention keeps per query; null: soft attention everywhere")
    neuron_group: int = setting(256, low=1, help="consecutive neurons tried together")
    agreement: float = setting(0.5, low=0.0, high=1.0, help="share of the rows that must be no worse than at first")
    factor: float = setting(1.1, low=1.0, help="of the lowest loss: above it a sub-layer is not looked into")
    inspect: bool = setting(True, help="try heads and neurons where a whole sub-layer cannot go")
    samples: int | None = setting(None, low=1, help="validation rows at most")
    hard_order: Literal["up", "down"] = setting("up", help="order of the blocks for hard attention")
    prune_order: Literal["up", "down"] = setting("down", help="order of the blocks for pruning")

    def __call__(self, subject: Subject) -> None:
        search = Search(subject, self)
        with search.hooked():
            search.run()
        subject.notes["axformer"] = search.notes()
        search.switches.apply(subject)

    def refuses(self, anatomy: Anatomy, task: Any) -> str | None:
        if task is not None and task.kind == "embedding":
            return "an embedding has no loss of its own for each row"
        if task is not None and not task.splits.get("validation"):
            return "it decides on validation rows, and the task has none; split some off its training rows"
        if anatomy.reduces_tokens:
            return "it drops tokens in its layers; reduce tokens last"
        more = anatomy.more_than_softmax("position_bias", "window", "mixer")
        if self.k is not None and (more is not None or not anatomy.swappable_attention):
            return "its attention cannot be exchanged for top-k attention; set k to null"
        if anatomy.residual.rotated:
            return "its residual stream changes its basis at each sub-layer, so none can go; remove parts before that"
        for path, projection in anatomy.linears().items() if self.inspect else ():
            for part in projection.module.modules():
                cuttable = is_dense(part) or isinstance(part, LowRankLinear)
                if is_linear(part) and (not cuttable or getattr(part, "pattern", _FREE) != _FREE):
                    return f"{path} is a {type(part).__name__}, which cannot be cut any more; prune before that"
        return None

    @classmethod
    def space(cls) -> dict[str, Choice | Range]:
        brief = {"k": None, "inspect": False, "samples": 128}  # for a search: twice as many passes as layers
        return {"agreement": Choice((0.3, 0.5)), **{name: Choice((value,)) for name, value in brief.items()}}

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return [{"k": None, "inspect": False, "samples": 128}]


class Search:
    """The greedy search on one subject; ``passes`` counts runs over the validation rows."""

    def __init__(self, subject: Subject, settings: AxFormer) -> None:
        self.subject, self.settings, self.task = subject, settings, subject.task
        self.anatomy: Anatomy = subject.anatomy
        self.switches = Switches(self.anatomy)
        self.batches = list(self.task.batches(subject.tokenizer, "validation", limit=settings.samples))
        self.log: list[dict[str, Any]] = []
        self.passes = 0
        self._lower = LowerLayers(self.anatomy, -1)

    def hooked(self) -> AbstractContextManager[None]:
        """Inside, the model computes what was decided; afterwards it is as it was."""
        return self.switches.hooked(mixing=self.settings.k is not None)

    def run(self) -> None:
        """Both parts, inside ``hooked``."""
        self.base = self.losses(0)
        self.lowest = float(self.base.mean())
        if not self.base.isfinite().all():
            bad = int((~self.base.isfinite()).sum())
            raise LeanError(
                f"method 'axformer': the model's loss is not finite on {bad} of {len(self.base)} validation rows, so "
                "nothing could be compared with it: load the model in float32 or bfloat16."
            )
        if len(self.base) < _FEW:
            _log.warning("axformer decides on %d validation rows; give it %d or more.", len(self.base), _FEW)
        count = range(len(self.switches.layers))
        if self.settings.k is not None:
            for index in count if self.settings.hard_order == "up" else reversed(count):
                for name, switch in self.switches.layers[index].items():
                    if isinstance(switch.part, Attention) and switch.part.mixer is None:
                        self.attempt(index, name, "hard")
        for index in reversed(count) if self.settings.prune_order == "down" else count:
            for name in reversed(self.switches.layers[index]):
                if self.switches.standing > 1:
                    self._prune(index, name)

    def _prune(self, index: int, name: str) -> None:
        accepted, loss = self.attempt(index, name, "gone")
        if accepted or not self.settings.inspect or not loss < self.settings.factor * self.lowest:
            return
        switch = self.switches.layers[index][name]
        heads = isinstance(switch.part, Attention)
        if heads and self.anatomy.family.shared_position_bias:
            return
        for members in torch.arange(switch.size).split(1 if heads else self.settings.neuron_group):
            if len(switch.members) + len(members) < switch.size:
                self.attempt(index, name, "members", members.tolist())

    def attempt(
        self, index: int, name: str, what: str, members: Sequence[int] = (), *, always: bool = False
    ) -> tuple[bool, float]:
        """Make one change and keep it if the rule allows (or ``always``): whether it did, and the mean loss."""
        undo = self._change(self.switches.layers[index][name], what, members)
        losses = self.losses(index)
        loss, agree = float(losses.mean()), int((losses <= self.base).sum())
        accepted = always or (loss < self.lowest and agree > self.settings.agreement * len(losses))
        if accepted:
            self.lowest = loss
            entry = {"layer": self.anatomy.layers[index].path, "sublayer": name, "what": what}
            self.log.append({**entry, "members": list(members), "loss": loss, "agree": agree})
        else:
            undo()
        return accepted, loss

    def _change(self, switch: Switch, what: str, members: Sequence[int]) -> Callable[[], None]:
        """Make a change; what undoes it."""
        if what == "hard":
            switch.mix("top_k", {"k": self.settings.k})
            return switch.unmix
        before = {"gone": switch.gone, "members": switch.members}
        if what == "gone":
            switch.gone = True
        else:
            switch.members = switch.members | set(members)
        return partial(switch.__dict__.update, before)

    def replay(self, log: Sequence[Mapping[str, Any]]) -> list[float]:
        """The mean loss after each decision of another search's log, inside ``hooked``."""
        self.base = self.losses(0)
        places = {layer.path: index for index, layer in enumerate(self.anatomy.layers)}
        return [
            self.attempt(places[one["layer"]], one["sublayer"], one["what"], one["members"], always=True)[1]
            for one in log
        ]

    def notes(self) -> dict[str, Any]:
        """What was found, as JSON: ``accepted`` holds every change that was kept, in order."""
        first = float(self.base.mean())
        rows = {"rows": len(self.base), "passes": self.passes}
        return {**rows, "loss_before": first, "loss_after": self.lowest, "accepted": self.log}

    @torch.inference_mode()
    def losses(self, index: int) -> Tensor:
        """The loss of each validation row, float64, in a fixed order. No layer before ``index`` may have changed since
        it was first asked for: they are run once."""
        if self._lower.index != index:
            self._lower = LowerLayers(self.anatomy, index)
        self.subject.model.eval()
        found: list[float] = []
        for number, batch in enumerate(self.batches):
            with self._lower.standing_in(number):
                outputs = self.task.forward(self.subject.model, batch)
            for row in range(len(outputs)):
                labels = {"labels": batch["labels"][row : row + 1]}
                found.append(float(self.task.loss(outputs[row : row + 1], labels)))
        self.passes += 1
        return torch.tensor(found, dtype=torch.float64)
