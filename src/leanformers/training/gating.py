"""Gates on the structural units of a model, and the penalty that trains them towards a budget.

Source: VTrans (Dutta et al., 2024, arXiv 2406.05276); the Lagrangian as in CoFi (Xia et al., 2022, arXiv 2204.00408).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from leanformers.anatomy import Anatomy, FeedForward
from leanformers.parts.gates import Gate, restricted_norm
from leanformers.training.callbacks import Penalty, progress_of

Count = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Cost of a model: of the residual width [], the heads [layers] and the neurons [layers] that it has."""


class Gates(nn.Module):
    """One gate on the residual stream (``hidden``, of all layers together), one per layer on the context of the
    heads, one per layer on the neurons, for a model of one stack. With grouped queries a head is a key/value head
    with its query heads. Kinds that are not asked for have no gate."""

    hidden: Gate | None
    heads: Any  # lists of gates
    neurons: Any
    all_hidden: Tensor
    all_heads: Tensor
    all_neurons: Tensor

    def __init__(self, anatomy: Anatomy, *, hidden: bool = True, heads: bool = True, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        layers = anatomy.layers
        self.hidden = Gate(anatomy.hidden_size, generator) if hidden else None
        groups = [layer.attention.num_key_value_heads for layer in layers]
        self.heads = nn.ModuleList(Gate(size, generator) for size in (groups if heads else ()))
        self.neurons = nn.ModuleList(Gate(layer.feed_forward.intermediate_size, generator) for layer in layers)
        sizes = [[anatomy.hidden_size], groups, [layer.feed_forward.intermediate_size for layer in layers]]
        for name, whole in zip(("all_hidden", "all_heads", "all_neurons"), sizes, strict=True):
            self.register_buffer(name, torch.tensor(whole, dtype=torch.float32), persistent=False)

    @contextlib.contextmanager
    def attached(self, anatomy: Anatomy, norms: Iterable[Any] = ()) -> Iterator[None]:
        """Gate the model inside the context; ``norms`` [hidden_size] then run over the hidden gate's dimensions."""
        handles: list[Any] = []
        replaced: list[Any] = []
        try:
            for index, layer in enumerate(anatomy.layers):
                units = {"feed_forward": self.neurons[index]}
                if len(self.heads):
                    units["attention"] = self.heads[index]
                for name, part in layer.sublayers().items():
                    writer = (part.down if isinstance(part, FeedForward) else part.output).module
                    if name in units:
                        handles.append(_before(writer, units[name]))
                    if self.hidden is not None:
                        handles.append(_after(writer, self.hidden))
            if self.hidden is not None:
                handles.append(_before(anatomy.layers[0].module, self.hidden))
            for norm in norms:
                norm.forward = self._norm(norm, anatomy)
                replaced.append(norm)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in replaced:
                del module.__dict__["forward"]

    def _norm(self, module: Any, anatomy: Anatomy) -> Callable[[Tensor], Tensor]:
        gate, family = self.hidden, anatomy.family
        assert gate is not None

        def forward(states: Tensor) -> Tensor:
            share = gate.shares().detach() if gate.training else gate.keep.float()
            return restricted_norm(states, module, share, rms=family.rms_norm, offset=family.norm_offset)

        return forward

    def sizes(self) -> dict[str, Any]:
        """How many units are to stay: the residual width, heads and neurons by layer."""
        hidden, heads, neurons = self.counted(kept)
        return {"hidden": int(hidden), "heads": heads.int().tolist(), "neurons": neurons.int().tolist()}

    def counted(self, of: Callable[[Gate], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Residual width [], heads [layers] and neurons [layers] by ``of``, which sums over a gate's units; whole
        where there is no gate. Float32."""
        hidden = self.all_hidden[0] if self.hidden is None else of(self.hidden)
        heads = torch.stack([of(gate) for gate in self.heads]) if len(self.heads) else self.all_heads
        return hidden, heads, torch.stack([of(gate) for gate in self.neurons])


def _before(module: nn.Module, gate: nn.Module) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (gate(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": gate(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _after(module: nn.Module, gate: nn.Module) -> Any:
    return module.register_forward_hook(lambda _, __, output: gate(output))


def soft(gate: Gate) -> Tensor:
    """The soft count of a gate's units."""
    return gate.shares().sum()


def certain(gate: Gate) -> Tensor:
    """How many of a gate's units carry more signal than noise."""
    return (gate.information() > 0).sum().float()


def kept(gate: Gate) -> Tensor:
    """How many of a gate's units are to stay."""
    return gate.keep.sum().float()


class Lagrangian(nn.Module):
    """linear * excess + square * excess^2, whose two multipliers start at 0 and are trained by gradient ascent."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.zeros(()))
        self.square = nn.Parameter(torch.zeros(()))

    def forward(self, excess: Tensor) -> Tensor:
        return self.linear * excess + self.square * excess.square()


class GatePenalty(Penalty):
    """beta * (weighted divergences of the gates) + the Lagrangian of how far the soft sparsity is from its aim.

    ``sparsity`` is 1 - count / whole, of a cost that ``count`` computes of the gates' counts. The aim rises linearly
    from 0 to ``target`` over the share ``warmup`` of the training. ``weights`` of the divergences: of the hidden gate,
    the heads, the neurons.
    """

    aim: Tensor
    gates: Gates

    def __init__(
        self,
        gates: Gates,
        count: Count,
        *,
        target: float,
        beta: float | None,
        weights: tuple[float, float, float],
        warmup: float,
        gate_rate: float,
        multiplier_rate: float,
    ) -> None:
        """beta: None for divergences that are worth one nat at the start."""
        super().__init__()
        self.gates, self.count, self.target, self.weights, self.warmup = gates, count, target, weights, warmup
        self.rates = gate_rate, multiplier_rate
        self.budget = Lagrangian()
        self.register_buffer("aim", torch.zeros(()))
        with torch.no_grad():
            self.beta = 1 / max(float(self.divergence()), 1e-6) if beta is None else beta

    def divergence(self) -> Tensor:
        gates, (hidden, head, neuron) = self.gates, self.weights
        terms = [neuron * gate.divergence() for gate in gates.neurons]
        terms += [head * gate.divergence() for gate in gates.heads]
        terms += [] if gates.hidden is None else [hidden * gates.hidden.divergence()]
        return torch.stack(terms).sum()

    def sparsity(self, of: Callable[[Gate], Tensor] = soft) -> Tensor:
        """Share of the cost that is gone when units are counted by ``of``."""
        whole = self.count(self.gates.all_hidden[0], self.gates.all_heads, self.gates.all_neurons)
        return 1 - self.count(*self.gates.counted(of)) / whole

    def forward(self) -> Tensor:
        return self.beta * self.divergence() + self.budget(self.sparsity() - self.aim)

    def groups(self) -> list[dict[str, Any]]:
        gates, multipliers = self.rates
        return [
            {"params": list(self.gates.parameters()), "lr": gates, "weight_decay": 0.0},
            {"params": list(self.budget.parameters()), "lr": multipliers, "weight_decay": 0.0, "maximize": True},
        ]

    def after_step(self, model: Any, step: int, total: int) -> None:
        self.aim.fill_(self.target * progress_of(step, total, end=self.warmup))
