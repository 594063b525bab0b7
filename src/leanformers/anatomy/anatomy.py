"""The map of a model: one vocabulary for every family.

``Anatomy.of(model)`` reads a loaded model, a skeleton on the meta device or an edited model. It only
looks; surgery changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from leanformers.anatomy import flops as _flops
from leanformers.anatomy.families import FAMILIES, find
from leanformers.anatomy.family import Family, StackPaths
from leanformers.anatomy.flops import Rows
from leanformers.anatomy.parts import Attention, FeedForward, Layer, Norm, Projection
from leanformers.anatomy.reading import has, read_layers, stack_norms
from leanformers.anatomy.residual import Residual
from leanformers.anatomy.softmax import Extra, extras
from leanformers.errors import LeanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_of(model: nn.Module) -> nn.Module:
    """The model without its head: ``BertModel`` of a ``BertForSequenceClassification``."""
    prefix = getattr(model, "base_model_prefix", "")
    return getattr(model, prefix, model) if prefix else model


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a model. Build it with ``Anatomy.of(model)``; after an edit, build it again."""

    family: Family
    model: PreTrainedModel
    base: nn.Module
    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, model: Any) -> Anatomy:
        """Read a model.

        Raises:
            LeanError: the family is unknown, or the model lacks a part that its entry names.
        """
        base = base_of(model)
        config = getattr(base, "config", None) or getattr(model, "config", None)
        model_type = getattr(config, "model_type", None)
        if model_type is None:
            raise LeanError(f"{type(model).__name__} is not a transformers model: it has no config.model_type.")
        family = find(model_type)
        if family is None:
            known = ", ".join(sorted(name for entry in FAMILIES for name in entry.model_types))
            raise LeanError(
                f"The family {model_type!r} ({type(model).__name__}) is not in the anatomy, which knows "
                f"{known}: add an entry to leanformers/anatomy/families and a line to the test matrix."
            )
        layers = [layer for stack in family.stacks for layer in read_layers(base, stack, family)]
        if not layers:
            raise LeanError(f"{type(model).__name__} has no layers where the entry {family.name!r} expects them.")
        return cls(family=family, model=model, base=base, layers=tuple(layers))

    # -- sizes -------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        config: Any = self.base.config
        return config.get_text_config() if hasattr(config, "get_text_config") and self.is_text else config

    @property
    def is_text(self) -> bool:
        return self.family.embeddings is not None

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        for layer in self.layers:
            for part in layer.sublayers().values():
                return (part.output if isinstance(part, Attention) else part.down).out_features
        return self.layers[0].attention.output.out_features

    @property
    def num_hidden_layers(self) -> int:
        """Layers of all stacks together."""
        return len(self.layers)

    @property
    def stacks(self) -> dict[str, list[Layer]]:
        stacks: dict[str, list[Layer]] = {}
        for layer in self.layers:
            stacks.setdefault(layer.stack, []).append(layer)
        return stacks

    @property
    def causal(self) -> bool:
        """Whether the (last) stack is a decoder."""
        return self.layers[-1].attention.causal

    @property
    def prefix(self) -> str:
        """What stands before a base-relative path in the whole model: ``"bert."`` or nothing."""
        return "" if self.base is self.model else self.model.base_model_prefix + "."

    # -- parts -------------------------------------------------------------------------------------------

    def module(self, path: str) -> nn.Module:
        """The module at a path relative to the base model.

        Raises:
            LeanError: nothing stands there.
        """
        if not has(self.base, path):
            raise LeanError(
                f"{type(self.model).__name__} has no module {path!r}: paths are relative to the base model, "
                f"such as {self.layers[0].path!r}."
            )
        return self.base.get_submodule(path)

    def stack_paths(self, name: str) -> StackPaths:
        """The entry of a stack that the model has.

        Raises:
            LeanError: it has none of that name.
        """
        if name not in self.stacks:
            have = " and ".join(sorted(self.stacks))
            raise LeanError(f"{type(self.model).__name__} has no stack {name!r}: it has {have}.")
        return next(stack for stack in self.family.stacks if stack.name == name)

    def attention(self, path: str) -> Attention:
        """The attention whose module stands at ``path``.

        Raises:
            LeanError: none stands there, or it was dropped.
        """
        for layer in self.layers:
            for attention in (layer.attention, layer.cross_attention):
                if attention is not None and attention.path == path:
                    return _present(attention)
        raise LeanError(f"No attention at {path!r}: the first one is at {self.layers[0].attention.path!r}.")

    def feed_forward(self, path: str) -> FeedForward:
        """The feed-forward at ``path``: its module's path, or the layer's where it has none of its own.

        Raises:
            LeanError: none stands there, or it was dropped.
        """
        for layer in self.layers:
            if layer.feed_forward.path == path:
                return _present(layer.feed_forward)
        raise LeanError(f"No feed-forward at {path!r}: the first one is at {self.layers[0].feed_forward.path!r}.")

    @cached_property
    def roles(self) -> dict[str, str]:
        """Path of every block linear, to its role: query, key, value, output, extra, gate, up, down; fused
        ones carry the joined names (``query+key+value``)."""
        roles: dict[str, list[str]] = {}
        for layer in self.layers:
            for part in layer.attentions():
                for role, projection in part.projections():
                    roles.setdefault(projection.path, []).append(role)
                for projection in part.extra:
                    roles.setdefault(projection.path, []).append("extra")
            for role, projection in layer.feed_forward.projections():
                roles.setdefault(projection.path, []).append(role)
        return {path: "+".join(names) for path, names in roles.items()}

    def role(self, path: str) -> str:
        """The role of the block linear at ``path``.

        Raises:
            LeanError: no block linear stands there.
        """
        if path not in self.roles:
            raise LeanError(f"No linear of a layer at {path!r}: the first one is at {next(iter(self.roles))!r}.")
        return self.roles[path]

    def paths(self, roles: Iterable[str]) -> list[str]:
        """Paths of the block linears that have one of these roles, a fused one by any of its own."""
        wanted = set(roles)
        return [path for path, role in self.roles.items() if wanted & set(role.split("+"))]

    def linears(self) -> dict[str, Projection]:
        """Every linear of the blocks as a whole module (fused ones once), by path."""
        return {path: Projection(path, self.module(path)) for path in self.roles}

    @property
    def embeddings(self) -> nn.Module | None:
        """The token embedding table, None for models that read no tokens."""
        path = self.embeddings_path
        return self.module(path) if path else None

    @property
    def embeddings_path(self) -> str | None:
        """Where the token embedding table stands."""
        return next((path for path in self.family.embeddings or () if has(self.base, path)), None)

    @property
    def head(self) -> nn.Module | None:
        """The language-model head, None where the model has none."""
        return self.model.get_output_embeddings()

    @property
    def tied(self) -> bool:
        """Whether head and embeddings are one tensor."""
        head, table = self.head, self.embeddings
        if head is None or table is None:
            return False
        weight = getattr(head, "weight", None)
        return weight is getattr(table, "weight", object())

    @property
    def norms(self) -> list[Norm]:
        """Every norm on the residual stream: the stacks' (``embedding``, ``final``), then the layers'."""
        stacks = [
            norm for stack in self.family.stacks if stack.name in self.stacks for norm in stack_norms(self.base, stack)
        ]
        return stacks + [norm for layer in self.layers for norm in layer.norms]

    @property
    def final_norms(self) -> list[Norm]:
        """The norms after the stacks' last layers."""
        return [norm for norm in self.norms if norm.place == "final"]

    @property
    def trunk(self) -> tuple[str, ...]:
        """Starts of the names, in the whole model, of what every checkpoint of the family must fill: layers,
        token embeddings and final norms. Heads and poolers come and go."""
        paths = [self.stack_paths(name).layers for name in self.stacks]
        paths += [norm.path for norm in self.final_norms]
        if self.embeddings_path:
            paths.append(self.embeddings_path)
        return tuple(f"{self.prefix}{path}." for path in paths)

    @cached_property
    def residual(self) -> Residual:
        """What reads and what writes the residual stream."""
        return Residual(self)

    # -- what can be done with it ------------------------------------------------------------------------

    def more_than_softmax(self, *known: Extra) -> str | None:
        """What attention is here beside softmax(query key) value and the ``known`` extras, in words that follow the
        model's name, such as "caps its attention scores"; None where it is no more than that (``softmax.py``)."""
        return next((words for extra, words in extras(self) if extra not in known), None)

    @property
    def swappable_attention(self) -> bool:
        """Whether attention is looked up in transformers' interface, so that another function can take its place."""
        return bool(self.model._can_set_attn_implementation())

    @property
    def reduces_tokens(self) -> bool:
        """Whether later layers see fewer tokens than the first (``reduce_tokens``)."""
        return any(layer.reducer is not None for layer in self.layers)

    @property
    def reads_one_vector(self) -> bool:
        """Whether the model is a base model, or one whose head sees one vector of a whole sequence."""
        return self.base is self.model or _flops.sees_one_vector(self.model)

    # -- cost --------------------------------------------------------------------------------------------

    def parameters(self) -> int:
        """Parameters of the whole model, tied ones once; a quantised weight counts its elements."""
        return count_parameters(self.model)

    def rows(self, path: str) -> Rows:
        """How many rows the linear at ``path`` (or inside a factorised one) multiplies per sequence.

        Raises:
            LeanError: no linear stands there.
        """
        found = self._rows.get(path) or self._rows.get(path.rpartition(".")[0])
        if found is None:
            raise LeanError(f"No linear at {path!r}: the first one is at {next(iter(self.roles))!r}.")
        return found

    @cached_property
    def _rows(self) -> dict[str, Rows]:
        outer = {name.removeprefix(self.prefix): rows for name, rows in _flops.outer_rows(self).items()}
        return {**outer, **_flops.block_rows(self)}

    def layer_flops(self, length: int, source_length: int | None = None) -> int:
        """FLOPs of the layers on one sequence (multiply-add = 2), attention counted over the full square.

        ``source_length`` is the encoder's length where there is a decoder too; by default the same.
        """
        return _flops.layer_flops(self, length, source_length)

    def flops(self, length: int, batch: int = 1, source_length: int | None = None) -> int:
        """FLOPs of one forward pass over ``batch`` unpadded sequences: layers, heads, poolers and embedding
        projections; ``flops.py`` says what is left out."""
        return batch * _flops.model_flops(self, length, source_length)


_Part = TypeVar("_Part", Attention, FeedForward)


def _present(part: _Part) -> _Part:
    if part.absent:
        raise LeanError(f"The sub-layer at {part.path!r} was dropped, so nothing is left to edit there: leave it out.")
    return part


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once; the int8 buffers of quantised parts count as the weights that they are."""
    held: list[Any] = [getattr(module, "qdata", None) for module in model.modules()]
    quantised = {id(data): data.numel() for data in held if isinstance(data, torch.Tensor)}
    return sum(parameter.numel() for parameter in model.parameters()) + sum(quantised.values())
