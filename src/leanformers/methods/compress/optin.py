"""OPTIN: which heads and neurons to keep under a FLOPs budget, in one shot, from forward passes alone.

Source: Khaki, Plataniotis (ICLR 2024, arXiv 2403.17921). Each unit is masked alone and one batch is run again: its
importance is how far the damage travels, the manifold-distillation error summed over the later blocks, plus the
change of the logits. Heads and neurons are then sorted globally, and the split of the budget between them is the
one that keeps the most importance. Units that go are cut out; nothing is retrained.
Choices where paper and reference code differ (the card): block outputs after the residual are compared; one set of
token rows serves all units; ``balance`` scales the logit term by the ratio of the medians, once, instead of unit by
unit; there is no prior on a unit's index. With grouped queries a unit is a key/value head with its query heads.
Every block keeps at least one head and one neuron. ``neuron_group`` above 1 scores neurons of like outgoing norm
together, which is not in the paper and divides the passes by it; ``multiple`` rounds it up. Left out: OPTIN_tau
(token reduction).
Cost: one masked pass over the later blocks per unit; memory for the reference features of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leanformers.anatomy import Anatomy, Attention, FeedForward, is_dense, is_linear
from leanformers.methods.base import Choice, Range, Saving, Subject, method, setting
from leanformers.parts import LowRankLinear
from leanformers.surgery import KeepHeads, KeepNeurons

Unit = tuple[int, str, tuple[int, ...]]  # layer, "head" or "neuron", indices


_BRIEF = {"samples": 16, "tokens": 512, "rows": 256, "neuron_group": 128}
"""For a search: scoring then takes about as long as the short training of an estimate."""


@method("optin", stock=False, stage="structure", order=10, needs=("calibration",), paper="Khaki, Plataniotis (2024)")
@dataclass(frozen=True, kw_only=True)
class Optin:
    """Keep the heads and neurons whose loss would travel furthest."""

    budget: float = setting(0.6, low=0.01, high=1.0, help="share of the heads' and neurons' multiply-adds that stays")
    samples: int = setting(128, low=1, help="texts in the one batch")
    tokens: int | None = setting(None, low=1, help="at most, of those texts together: fewer texts where they are long")
    rows: int = setting(768, low=2, help="token rows of the Gram matrices")
    temperature: float = setting(4.0, low=0.01, help="of the logit term")
    balance: float = setting(0.1, low=0.0, help="weight of the logit term")
    neuron_group: int = setting(1, low=1, help="neurons scored together")
    multiple: int = setting(1, low=1, help="of which the kept neurons of a layer are one, for formats that want it")

    def __call__(self, subject: Subject) -> None:
        if self.budget == 1.0:
            return
        batch = next(subject.calibration(self.samples, batch_size=self.samples))
        subject.check_calibration("optin", [batch])
        batch = _shortened(batch, self.tokens)
        scores = Scorer(subject, batch, self).scores()
        length = float(_real(batch).sum()) / len(_real(batch))
        for index, (heads, neurons) in enumerate(select(subject.anatomy, scores, self.budget, length)):
            layer = subject.anatomy.layers[index]  # one map for all would keep the layers as they were
            if len(heads) < layer.attention.num_key_value_heads:
                subject.apply(KeepHeads(path=layer.attention.path, size=len(heads)), keep=torch.tensor(heads))
            if len(neurons) < layer.feed_forward.intermediate_size:
                keep = torch.tensor(neurons)
                subject.apply(KeepNeurons(path=layer.feed_forward.path, size=len(neurons)), keep=keep)

    def refuses(self, anatomy: Anatomy, task: Any) -> str | None:
        if len(anatomy.stacks) > 1 or not anatomy.is_text:
            return "it scores text models of one stack"
        if anatomy.reduces_tokens:
            return "it drops tokens in its layers; reduce tokens last"
        for path, projection in anatomy.linears().items():
            for part in projection.module.modules():
                if is_linear(part) and not is_dense(part) and not isinstance(part, LowRankLinear):
                    return f"{path} is a {type(part).__name__}, which cannot be cut any more; prune before that"
        least = sum(_head_cost(a, 1, 1) for a in (layer.attention for layer in anatomy.layers) if not a.absent)
        if self.budget * _total(anatomy, 1) < least:
            return f"a budget of {self.budget} is below the cost of one head per layer"
        return None

    def estimate(self, anatomy: Anatomy, length: int = 128) -> Saving:
        flops = -(1 - self.budget) * 2 * _total(anatomy, length)
        weights = sum(
            projection.in_features * projection.out_features
            for layer in anatomy.layers
            for part in (layer.attention, layer.feed_forward)
            for _, projection in part.projections()
        )
        return Saving(parameters=round(-(1 - self.budget) * weights), flops=round(flops))

    @classmethod
    def space(cls) -> dict[str, Choice | Range]:
        return {
            "budget": Choice((0.5, 0.65, 0.8)),
            **{name: Choice((value,)) for name, value in _BRIEF.items()},
        }

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return [{"budget": 0.65, **_BRIEF}]


class Scorer:
    """Importance of every head and neuron of a subject's model on one batch."""

    def __init__(self, subject: Subject, batch: dict[str, Tensor], settings: Optin) -> None:
        self.subject, self.batch, self.settings = subject, batch, settings
        self.anatomy: Anatomy = subject.anatomy
        self.modules = [layer.module for layer in self.anatomy.layers]
        real = _real(batch).flatten().nonzero().flatten().cpu()
        generator = torch.Generator().manual_seed(subject.seed)
        chosen = real[torch.randperm(len(real), generator=generator)[: settings.rows]]
        self.rows = chosen.sort().values.to(_real(batch).device)
        self.outputs: list[Any] = []
        self.features: dict[int, Tensor] = {}

    def scores(self) -> dict[Unit, float]:
        """Importance of each unit: later blocks' Gram differences plus the balanced logit term."""
        return balanced(*self.terms(), self.settings.balance)

    @torch.inference_mode()
    def terms(self) -> tuple[dict[Unit, float], dict[Unit, float]]:
        """The two terms of every unit's importance, apart: Gram differences, and change of the logits."""
        self.subject.model.eval()
        with self._watching(0, keep=True):
            reference_logits = self._run()
        reference = {index: _grams(rows) for index, rows in self.features.items()}
        manifold, logits = {}, {}
        last = len(self.modules) - 1
        for unit in self._units():
            index, kind, members = unit
            with self._cached(index), self._watching(index), self._masked(index, kind, members):
                changed = self._run()
            compared = [k for k in self.features if k > index] or [last]
            manifold[unit] = sum(_gram_error(reference[k], self.features[k]) for k in compared)
            logits[unit] = self._logit_error(reference_logits, changed)
        return manifold, logits

    def _run(self) -> Tensor:
        return self.subject.task.forward(self.subject.model, self.batch).float()

    def _units(self) -> Iterator[Unit]:
        for index, layer in enumerate(self.anatomy.layers):
            if not self.anatomy.family.shared_position_bias:
                for head in range(layer.attention.num_key_value_heads):
                    yield index, "head", (head,)
            if layer.feed_forward.absent:
                continue
            norms = layer.feed_forward.down.weight().float().norm(dim=0)
            together = -(-self.settings.neuron_group // self.settings.multiple) * self.settings.multiple
            for group in norms.argsort(stable=True).split(together):
                yield index, "neuron", tuple(sorted(group.tolist()))

    def _logit_error(self, reference: Tensor, changed: Tensor) -> float:
        if self.subject.task.kind == "embedding":  # no logits: the angle between the embeddings stands in
            return float((1 - torch.cosine_similarity(reference, changed, dim=-1)).sum().clamp_min(0))
        if self.subject.task.kind == "text-regression":
            return float((reference - changed).square().sum())
        if reference.ndim == 3:
            mask = _real(self.batch).bool()
            reference, changed = reference[mask], changed[mask]
        temperature = self.settings.temperature
        before = (reference / temperature).log_softmax(-1)
        after = (changed / temperature).log_softmax(-1)
        return float(temperature**2 * (before.exp() * (before - after)).sum().clamp_min(0))

    @contextmanager
    def _watching(self, first: int, *, keep: bool = False) -> Iterator[None]:
        """Record the chosen token rows of the outputs of layer ``first`` and later; all outputs if ``keep``."""
        self.features = {}
        handles = []
        for index in range(first, len(self.modules)):

            def record(_: nn.Module, __: Any, output: Any, index: int = index) -> None:
                if keep:
                    self.outputs.append(output)
                states = output[0] if isinstance(output, tuple) else output
                self.features[index] = states.reshape(-1, states.shape[-1])[self.rows].float()

            handles.append(self.modules[index].register_forward_hook(record))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _cached(self, first: int) -> Iterator[None]:
        """Let the layers before ``first`` answer from the reference pass instead of computing."""
        for module, output in zip(self.modules[:first], self.outputs[:first], strict=True):
            module.forward = _constant(output)
        try:
            yield
        finally:
            for module in self.modules[:first]:
                del module.__dict__["forward"]

    @contextmanager
    def _masked(self, index: int, kind: str, members: tuple[int, ...]) -> Iterator[None]:
        layer = self.anatomy.layers[index]
        if kind == "head":
            attention = layer.attention
            width = attention.num_attention_heads // attention.num_key_value_heads * attention.head_dim
            columns = torch.arange(members[0] * width, (members[0] + 1) * width)
            module = attention.output.module
        else:
            columns, module = torch.tensor(members), layer.feed_forward.down.module

        def silence(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0].index_fill(-1, columns.to(args[0].device), 0), *args[1:])

        handle = module.register_forward_pre_hook(silence)
        try:
            yield
        finally:
            handle.remove()


def balanced(manifold: dict[Unit, float], logits: dict[Unit, float], balance: float) -> dict[Unit, float]:
    """The sum of both terms, the logits' scaled to the other's median times ``balance``."""
    scale = _median(manifold) / _median(logits) if _median(logits) > 0 else 0.0
    return {unit: manifold[unit] + balance * scale * logits[unit] for unit in manifold}


def _shortened(batch: dict[str, Tensor], tokens: int | None) -> dict[str, Tensor]:
    """The first of its texts, one at least, that have no more tokens than that together."""
    if tokens is None:
        return batch
    kept = max(1, int((_real(batch).sum(1).cumsum(0) <= tokens).sum()))
    return {name: value[:kept] for name, value in batch.items()}


def _constant(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _real(batch: dict[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask


def _median(values: dict[Unit, float]) -> float:
    return float(torch.tensor(list(values.values())).median())


def _grams(rows: Tensor) -> tuple[Tensor, float]:
    """Normalised rows [K, hidden_size], and the squared Frobenius norm of their Gram matrix."""
    rows = nn.functional.normalize(rows, dim=-1)
    return rows, float((rows.t() @ rows).square().sum())


def _gram_error(reference: tuple[Tensor, float], rows: Tensor) -> float:
    """sum (F F^T - F' F'^T)^2 over K x K, from hidden_size x hidden_size products where those are smaller."""
    normal, square = reference
    changed = nn.functional.normalize(rows, dim=-1)
    if changed.shape[0] <= changed.shape[1]:
        return float((normal @ normal.t() - changed @ changed.t()).square().sum())
    other = (changed.t() @ changed).square().sum()
    cross = (normal.t() @ changed).square().sum()
    return max(float(square + other - 2 * cross), 0.0)


# -- the search under a budget ------------------------------------------------------------------------------------


def select(
    anatomy: Anatomy, scores: dict[Unit, float], budget: float, length: float
) -> list[tuple[list[int], list[int]]]:
    """Kept heads and neurons of each layer: the split with the highest total score within the budget."""
    heads = sorted((u for u in scores if u[1] == "head"), key=lambda u: (-scores[u], u))
    neurons = sorted((u for u in scores if u[1] == "neuron"), key=lambda u: (-scores[u], u))
    allowed = budget * _total(anatomy, length)
    must = _best_of_each_layer(heads, scores) + _best_of_each_layer(neurons, scores)
    heads = [u for u in heads if u not in must]
    neurons = [u for u in neurons if u not in must]
    costs = {u: _unit_cost(anatomy, u, length) for u in scores}
    spent = sum(costs[u] for u in must)
    if not any(u[1] == "head" for u in scores):  # heads that cannot go still cost
        spent += sum(
            _head_cost(layer.attention, length, layer.attention.num_key_value_heads) for layer in anatomy.layers
        )
    best: tuple[float, list[Unit]] = (-1.0, [])
    kept_heads: list[Unit] = []
    head_score = head_cost = 0.0
    for taken in range(len(heads) + 1):
        if taken:
            head_score += scores[heads[taken - 1]]
            head_cost += costs[heads[taken - 1]]
            kept_heads.append(heads[taken - 1])
        left = allowed - spent - head_cost
        if left < 0:
            break
        total, filled = head_score, []
        for unit in neurons:
            if costs[unit] > left:
                break
            left -= costs[unit]
            total += scores[unit]
            filled.append(unit)
        if total > best[0]:
            best = (total, [*kept_heads, *filled])
    chosen = [*must, *best[1]]
    kept: list[tuple[list[int], list[int]]] = []
    for index, layer in enumerate(anatomy.layers):
        pick = {
            kind: sorted(m for u in chosen if u[0] == index and u[1] == kind for m in u[2])
            for kind in ("head", "neuron")
        }
        every = list(range(layer.attention.num_key_value_heads))
        kept.append((pick["head"] if any(u[1] == "head" for u in scores) else every, pick["neuron"]))
    return kept


def _best_of_each_layer(units: list[Unit], scores: dict[Unit, float]) -> list[Unit]:
    best: dict[int, Unit] = {}
    for unit in units:  # sorted, best first
        best.setdefault(unit[0], unit)
    return list(best.values())


def _head_cost(attention: Attention, length: float, groups: int) -> float:
    """Multiply-adds of key/value heads with their query heads on one sequence."""
    per = attention.num_attention_heads // max(attention.num_key_value_heads, 1)
    width = attention.head_dim
    return groups * (length * attention.output.out_features * width * (2 * per + 2) + 2 * length**2 * width * per)


def _neuron_cost(part: FeedForward, length: float) -> float:
    return length * part.down.out_features * (2 if part.gate is None else 3)


def _unit_cost(anatomy: Anatomy, unit: Unit, length: float) -> float:
    layer = anatomy.layers[unit[0]]
    if unit[1] == "head":
        return _head_cost(layer.attention, length, 1)
    return len(unit[2]) * _neuron_cost(layer.feed_forward, length)


def _total(anatomy: Anatomy, length: float) -> float:
    return sum(
        _head_cost(layer.attention, length, layer.attention.num_key_value_heads)
        + layer.feed_forward.intermediate_size * _neuron_cost(layer.feed_forward, length)
        for layer in anatomy.layers
    )
