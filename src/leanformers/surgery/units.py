"""The structural units of a model under one budget: what residual dimensions, heads and neurons cost, and which of
them stay when all are ranked together.

For models of one stack. With grouped queries a head is a key/value head with its query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from leanformers.anatomy import Anatomy, Layer, count_parameters, linear_shape
from leanformers.parts.linear import LowRankLinear

Measure = Literal["parameters", "flops"]
_CONSTANT, _HIDDEN, _HEADS, _NEURONS, _HEADS_HIDDEN, _NEURONS_HIDDEN = range(6)


class UnitCosts:
    """The layers' parameters (all of them) or FLOPs, as a function of how many units they have.

    ``terms`` [layers, 6], float64: the coefficients of 1, hidden, heads, neurons, heads * hidden, neurons * hidden.
    ``whole`` is the model as it is. embeddings: count what starts and ends the residual stream too (parameters).
    """

    def __init__(
        self, anatomy: Anatomy, measure: Measure = "parameters", *, length: int = 128, embeddings: bool = False
    ) -> None:
        self.hidden_size = anatomy.hidden_size
        self.heads = [layer.attention.num_key_value_heads for layer in anatomy.layers]
        self.neurons = [layer.feed_forward.intermediate_size for layer in anatomy.layers]
        self.terms = torch.zeros(len(anatomy.layers), 6, dtype=torch.float64)
        for row, layer in zip(self.terms, anatomy.layers, strict=True):
            self._add_linears(row, anatomy, layer, measure, length)
            attention = layer.attention
            if measure == "flops" and not attention.absent:
                width = attention.num_attention_heads // attention.num_key_value_heads * attention.head_dim
                row[_HEADS] += width * length * (4 * length + 2 * attention.position_terms * attention.positions)
            if measure == "parameters":
                for norm in layer.norms:
                    row[_HIDDEN] += sum(p.numel() for p in norm.module.parameters()) / self.hidden_size
                counted = self._of_layer(row, layer)
                row[_CONSTANT] += count_parameters(layer.module) - counted  # norms of heads, mixers, shortcuts
        if embeddings and measure == "parameters":
            ends: list[nn.Parameter] = [*anatomy.residual.tables.values()]
            ends += [p for module in anatomy.residual.inputs.values() for p in module.parameters()]
            ends += [part.module.weight for part in anatomy.residual.outputs.values()]
            unique = {id(parameter): parameter.numel() for parameter in ends}
            self.terms[0, _HIDDEN] += sum(unique.values()) / self.hidden_size
        self.whole = float(self(*map(torch.tensor, (self.hidden_size, self.heads, self.neurons))))

    def _add_linears(self, row: Tensor, anatomy: Anatomy, layer: Layer, measure: Measure, length: int) -> None:
        attention, part = layer.attention, layer.feed_forward
        linears = [*attention.projections(), *part.projections()]
        linears += [] if attention.absent else [("extra", projection) for projection in attention.extra]
        inside = {p.path for _, p in part.projections()}
        kinds = {p.path: "out" if role in ("output", "down") else "in" for role, p in linears}  # fused ones once
        for path, kind in kinds.items():
            module = anatomy.module(path)
            units = part.intermediate_size if path in inside else attention.num_key_value_heads
            of_units, crossed = (_NEURONS, _NEURONS_HIDDEN) if path in inside else (_HEADS, _HEADS_HIDDEN)
            out_features, in_features = linear_shape(module)
            width = (out_features if kind == "in" else in_features) / units  # features of a unit
            factor = 1 if measure == "parameters" else 2 * anatomy.rows(path).count(length)
            if isinstance(module, LowRankLinear):
                rank = linear_shape(module.up)[1]
                row[_HIDDEN] += factor * rank
                row[of_units] += factor * rank * width
            else:
                row[crossed] += factor * width
            if measure == "parameters" and getattr(module, "bias", None) is not None:
                row[of_units if kind == "in" else _HIDDEN] += width if kind == "in" else 1

    def _of_layer(self, row: Tensor, layer: Layer) -> float:
        heads, neurons = layer.attention.num_key_value_heads, layer.feed_forward.intermediate_size
        width = self.hidden_size
        counts = [1, width, heads, neurons, heads * width, neurons * width]
        return float(row @ torch.tensor(counts, dtype=row.dtype))

    def of_units(self) -> tuple[float, float, float]:
        """What a residual dimension costs in the model as it is, and what a head and a neuron do, over the layers that
        have them on average."""
        wide = self.terms.sum(0)[_HIDDEN]
        wide += (self.terms[:, _HEADS_HIDDEN] * torch.tensor(self.heads)).sum()
        wide += (self.terms[:, _NEURONS_HIDDEN] * torch.tensor(self.neurons)).sum()
        found = [float(wide)]
        for alone, crossed, counts in ((_HEADS, _HEADS_HIDDEN, self.heads), (_NEURONS, _NEURONS_HIDDEN, self.neurons)):
            each = self.terms[:, alone] + self.terms[:, crossed] * self.hidden_size
            found.append(float(each.sum()) / max(sum(count > 0 for count in counts), 1))
        return found[0], found[1], found[2]

    def __call__(self, hidden: Tensor, heads: Tensor, neurons: Tensor) -> Tensor:
        """The cost, a scalar, of a residual width [], heads [layers] and neurons [layers]; soft counts too."""
        terms = self.terms.to(device=hidden.device, dtype=hidden.dtype if hidden.is_floating_point() else None)
        of_heads = (terms[:, _HEADS] + terms[:, _HEADS_HIDDEN] * hidden) * heads
        of_neurons = (terms[:, _NEURONS] + terms[:, _NEURONS_HIDDEN] * hidden) * neurons
        return (terms[:, _CONSTANT] + terms[:, _HIDDEN] * hidden + of_heads + of_neurons).sum()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The least that stays: of the residual width, of the heads and of the neurons of a layer. Widths are rounded to
    the nearest ``multiple`` (whole widths stay as they are)."""

    hidden: int = 64
    heads: int = 1
    neurons: int = 1
    multiple: int = 1

    def rounded(self, count: int, size: int, least: int) -> int:
        """The width nearest to ``count`` that may be kept of ``size``."""
        near = round(count / self.multiple) * self.multiple
        return min(max(near, -(-least // self.multiple) * self.multiple), size)


def least_cost(costs: UnitCosts, limits: Limits, *, hidden: bool, heads: bool) -> float:
    """The cost of the smallest model within the limits. hidden, heads: whether those may be cut."""
    width = limits.rounded(0, costs.hidden_size, limits.hidden) if hidden else costs.hidden_size
    groups = [min(limits.heads, size) if heads else size for size in costs.heads]
    neurons = [limits.rounded(0, size, limits.neurons) for size in costs.neurons]
    return float(costs(*map(torch.tensor, (width, groups, neurons))))


def keep_by_rank(
    costs: UnitCosts,
    allowed: float,
    hidden: Tensor | None,
    heads: Sequence[Tensor],
    neurons: Sequence[Tensor],
    limits: Limits,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Which units stay, bool masks of the shapes of the scores, when one threshold on all scores is moved until the
    cost is at most ``allowed``.

    hidden: scores [hidden_size], None where the width stays; heads, neurons: one tensor per layer; no tensors for
    heads that stay. What is left of the budget beside the first residual dimension or head that is too dear for it
    goes to the best neurons. Equal scores go in order of place. Within the limits even where that costs more.
    """
    groups = [*([hidden] if hidden is not None else []), *heads, *neurons]
    first_neurons = len(groups) - len(neurons)
    leasts = [limits.hidden] * (hidden is not None) + [limits.heads] * len(heads) + [limits.neurons] * len(neurons)
    orders = [scores.detach().double().cpu().argsort(descending=True, stable=True) for scores in groups]
    values = torch.cat([g.detach().double().cpu()[order] for g, order in zip(groups, orders, strict=True)])
    owner = torch.cat([torch.full((len(order),), index) for index, order in enumerate(orders)])
    # Of each group the best come first anyway, so a count of units says which; a stable sort keeps their order.
    ranking = owner[values.argsort(descending=True, stable=True)]

    def sizes(counts: Tensor) -> list[int]:
        found = []
        for index, (count, order, least) in enumerate(zip(counts.tolist(), orders, leasts, strict=True)):
            wide = index >= first_neurons or (hidden is not None and index == 0)
            found.append(limits.rounded(count, len(order), least) if wide else max(count, min(least, len(order))))
        return found

    def cost(found: list[int]) -> float:
        rest = found[1:] if hidden is not None else found
        width = found[0] if hidden is not None else costs.hidden_size
        of_heads = rest[: len(heads)] or costs.heads
        return float(costs(*map(torch.tensor, (width, of_heads, rest[len(heads) :]))))

    def fill(before: Tensor, units: Tensor) -> tuple[Tensor, int]:
        """Counts after the longest start of ``units`` that fits, and its length."""
        low, high = 0, len(units)
        while low < high:
            middle = (low + high + 1) // 2
            counts = before + units[:middle].bincount(minlength=len(groups))
            low, high = (middle, high) if cost(sizes(counts)) <= allowed else (low, middle - 1)
        return before + units[:low].bincount(minlength=len(groups)), low

    counts, taken = fill(torch.zeros(len(groups), dtype=torch.int64), ranking)
    rest = ranking[taken:]
    counts, _ = fill(counts, rest[rest >= first_neurons])
    masks = []
    for order, size in zip(orders, sizes(counts), strict=True):
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[:size]] = True
        masks.append(mask)
    of_hidden = masks[0] if hidden is not None else None
    return of_hidden, masks[first_neurons - len(heads) : first_neurons], masks[first_neurons:]
