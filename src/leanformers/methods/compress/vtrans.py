"""VTrans: gates with a variational bottleneck learn which residual dimensions, heads and neurons can go.

Source: Dutta, Gupta, Agarwal (2024, arXiv 2406.05276); what the abstract leaves open is taken from the same authors'
follow-up for language models (TVA-Prune). Units are multiplied by mean + deviation * noise, drawn for each token; a KL
term pushes their signal below their noise, and a Lagrangian pulls the soft count of what is left to the target. Then
the units with the most signal over noise stay, one threshold for all, their means go into the weights, the rest is cut.
``variant``: "vtrans" trains weights and gates, "fast" does on 3 % of the data, "faster" trains the gates alone.
Deviations: the threshold is moved until the model that is left meets the target exactly (the soft count may end far
from it); steps take 8 examples instead of 1, so that gates get an eighth of the authors' steps (``batch_size``); there
are no gates on whole sub-layers, and no choice among the steps by validation; the KL of a unit is weighted by its
cost in neurons (on a Llama-7B 129 for a dimension and 171 for a head, where the authors take 95 and 256); fine-tuning
afterwards is a step of its own (distillation, lora). While gates train, norms weigh a dimension by its soft count.
With grouped queries a unit is a key/value head with its query heads. Embedders keep the width of their vectors.
Cost: of the training, one forward and backward pass per step, with noise as large as what is gated; afterwards dense
layers of smaller shapes, whose widths ``multiple`` rounds for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from leanformers.anatomy import Anatomy, is_dense
from leanformers.errors import LeanError
from leanformers.methods.base import Choice, Range, Saving, Subject, method, setting
from leanformers.parts import LowRankLinear
from leanformers.surgery import KeepHeads, KeepNeurons, SliceResidual
from leanformers.surgery.scaling import curved_start, scale_linear, scale_residual
from leanformers.surgery.stream import Stream
from leanformers.surgery.units import Limits, UnitCosts, keep_by_rank, least_cost

_FAST = 0.03  # share of the data
_LEAST_WIDTH = 64


@method("vtrans", stock=False, stage="structure", order=15, trains=True, needs=("text",), paper="Dutta et al. (2024)")
@dataclass(frozen=True, kw_only=True)
class VTrans:
    """Learn which residual dimensions, heads and neurons can go, under a budget."""

    target: float = setting(0.3, low=0.0, high=0.999, help="share of the layers' cost that goes")
    measure: Literal["parameters", "flops"] = setting("parameters", help="what the cost is")
    length: int = setting(128, low=1, help="tokens of a text, for the FLOPs")
    embeddings: bool = setting(False, help="whether embeddings and heads count among the parameters")
    variant: Literal["vtrans", "fast", "faster"] = setting("vtrans", help="fast: 3 % of the data; faster: gates alone")
    hidden: bool | None = setting(None, help="gate the residual width too; by default wherever it can be cut")
    multiple: int = setting(1, low=1, help="kept widths are rounded to one of it, where a GPU wants that")
    epochs: float = setting(1.0, low=0.0, help="passes over the training data")
    learning_rate: float = setting(2e-5, low=0.0, help="of the weights")
    gate_rate: float | None = setting(None, low=0.0, help="of the gates; by default 0.05, above a target of 0.5 0.1")
    multiplier_rate: float = setting(0.1, low=0.0, help="of the Lagrangian's ascent")
    beta: float | None = setting(None, low=0.0, help="weight of the KL; by default it starts at one nat")
    kl_weights: tuple[float, float, float] | None = setting(
        None, help="of the KL of dimensions, heads, neurons; by default their costs"
    )
    rise: float | None = setting(None, low=0.0, high=1.0, help="share of the steps over which the aim rises")
    batch_size: int = setting(8, low=1, help="examples per step")
    limit: int | None = setting(None, low=1, help="training examples used at most")
    distil: bool = setting(False, help="learn the teacher's outputs instead of the labels alone")

    def __call__(self, subject: Subject) -> None:
        if self.target == 0:
            return
        if self.distil and subject.teacher is None:
            raise LeanError("method 'vtrans' with distil needs a teacher; run it in a recipe with a task.")
        from leanformers.training.gating import certain, soft

        anatomy = subject.anatomy
        penalty = self.penalty(anatomy, subject.task, subject.seed)
        gates = penalty.gates
        with gates.attached(anatomy, norms(anatomy) if gates.hidden is not None else ()):
            self._train(subject, penalty)
        with torch.no_grad():
            told = {"soft": float(penalty.sparsity(soft)), "certain": float(penalty.sparsity(certain))}
        kept_share = self.settle(penalty)
        subject.notes["vtrans"] = {**told, "sparsity": 1 - kept_share, **gates.sizes()}
        harden(subject, gates)

    def _train(self, subject: Subject, penalty: Any) -> None:
        from leanformers.training import Distillation

        limit = self.limit
        if self.variant == "fast":
            rows = len(subject.task.splits["train"])
            limit = min(limit or rows, max(1, round(_FAST * rows)))
        subject.train(
            self.epochs,
            self.learning_rate,
            batch_size=self.batch_size,
            limit=limit,
            distillation=Distillation() if self.distil else None,
            freeze=("all",) if self.variant == "faster" else (),
            penalty=penalty,
            warmup=0.0,
        )

    def penalty(self, anatomy: Anatomy, task: Any, seed: int = 0) -> Any:
        """New gates on a model, and what trains them, on the model's device."""
        from leanformers.training.gating import GatePenalty, Gates

        gates = Gates(anatomy, hidden=self._hidden(anatomy, task), heads=_heads(anatomy), seed=seed)
        costs = self._costs(anatomy)
        hidden, head, neuron = costs.of_units()
        weights = self.kl_weights or (hidden / neuron, head / neuron, 1.0)
        gate_rate = self.gate_rate if self.gate_rate is not None else (0.1 if self.target > 0.5 else 0.05)
        penalty = GatePenalty(
            gates,
            costs,
            target=self.target,
            beta=self.beta,
            weights=weights,
            warmup=self.rise if self.rise is not None else (0.2 if self.target > 0.6 else 0.1),
            gate_rate=gate_rate,
            multiplier_rate=self.multiplier_rate,
        )
        return penalty.to(next(anatomy.model.parameters()).device)

    def settle(self, penalty: Any) -> float:
        """Decide which units stay, by rank under the budget; the share of the cost that does."""
        gates, costs = penalty.gates, penalty.count
        hidden = None if gates.hidden is None else gates.hidden.information()
        heads, neurons = ([gate.information() for gate in kind] for kind in (gates.heads, gates.neurons))
        masks = keep_by_rank(costs, (1 - self.target) * costs.whole, hidden, heads, neurons, self._limits())
        if gates.hidden is not None:
            gates.hidden.settle(masks[0])
        for kind, chosen in zip((gates.heads, gates.neurons), masks[1:], strict=True):
            for gate, mask in zip(kind, chosen, strict=True):
                gate.settle(mask)
        from leanformers.training.gating import kept

        return float(costs(*gates.counted(kept))) / costs.whole

    def _costs(self, anatomy: Anatomy) -> UnitCosts:
        return UnitCosts(anatomy, self.measure, length=self.length, embeddings=self.embeddings)

    def _limits(self) -> Limits:
        return Limits(hidden=_LEAST_WIDTH, multiple=self.multiple)

    def _hidden(self, anatomy: Anatomy, task: Any) -> bool:
        return self.hidden is not False and stiff(anatomy, task) is None

    def refuses(self, anatomy: Anatomy, task: Any) -> str | None:
        if len(anatomy.stacks) > 1:
            return "it gates models of one stack, not an encoder with a decoder"
        for path, projection in anatomy.linears().items():
            module = projection.module
            if not (is_dense(module) or isinstance(module, LowRankLinear)):
                return f"{path} is a {type(module).__name__}, out of which no units can be cut: prune first"
            if getattr(module, "pattern", "unstructured") != "unstructured":
                return f"{path} holds a {module.pattern} mask, which single units cannot leave: prune before masking"
        if self.hidden and (reason := stiff(anatomy, task)):
            return f"its residual width cannot be cut ({reason}); set hidden to false"
        costs, hidden = self._costs(anatomy), self._hidden(anatomy, task)
        least = least_cost(costs, self._limits(), hidden=hidden, heads=_heads(anatomy))
        if least > (1 - self.target) * costs.whole:
            most = 1 - least / costs.whole
            return (
                f"a target of {self.target} is out of reach; with one head and the least widths kept it is {most:.3f}"
            )
        return None

    def estimate(self, anatomy: Anatomy, length: int = 128) -> Saving:
        parameters = UnitCosts(anatomy, embeddings=self.embeddings).whole
        flops = UnitCosts(anatomy, "flops", length=length).whole
        return Saving(parameters=-round(self.target * parameters), flops=-round(self.target * flops))

    @classmethod
    def space(cls) -> dict[str, Choice | Range]:
        return {"target": Choice((0.2, 0.35, 0.5)), "variant": Choice(("faster",))}

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return [{"target": 0.35, "variant": "faster"}]


def stiff(anatomy: Anatomy, task: Any) -> str | None:
    """Why the residual width has to stay as it is, None where it can be cut."""
    if getattr(task, "kind", None) == "embedding":
        return "it is the width of the vectors that the task makes"
    if reason := curved_start(anatomy):
        return reason
    try:
        SliceResidual(size=anatomy.hidden_size).cost(anatomy)
    except LeanError as error:
        return str(error).rstrip(".")
    return None


def norms(anatomy: Anatomy) -> list[Any]:
    """The norms that run over the residual dimensions."""
    return [module for module in Stream.of(anatomy, anatomy.hidden_size).norms if hasattr(module, "weight")]


def _heads(anatomy: Anatomy) -> bool:
    return not anatomy.family.shared_position_bias


def harden(subject: Subject, gates: Any) -> None:
    """Fold the means of the gates into the weights around them, and cut out the units that are not kept."""
    if gates.hidden is not None:
        scale_residual(subject.anatomy, gates.hidden.mean)
    for index, neurons in enumerate(gates.neurons):
        part = subject.anatomy.layers[index].feed_forward  # one map for all would keep the layers as they were
        if not part.absent:
            scale_linear(part.down.module, 1, neurons.mean)
            if not neurons.keep.all():
                keep = neurons.keep.nonzero().flatten().cpu()
                subject.apply(KeepNeurons(path=part.path, size=len(keep)), keep=keep)
    for index, heads in enumerate(gates.heads):  # none where heads cannot go
        attention = subject.anatomy.layers[index].attention
        if not attention.absent:
            width = attention.num_attention_heads // attention.num_key_value_heads * attention.head_dim
            scale_linear(attention.output.module, 1, heads.mean.repeat_interleave(width))
            if not heads.keep.all():
                keep = heads.keep.nonzero().flatten().cpu()
                subject.apply(KeepHeads(path=attention.path, size=len(keep)), keep=keep)
    if gates.hidden is not None and not gates.hidden.keep.all():
        keep = gates.hidden.keep.nonzero().flatten().cpu()
        subject.apply(SliceResidual(size=len(keep)), keep=keep)
