"""Drop layers: keep some layers of a stack, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from leanformers.anatomy import Anatomy, Layer, count_parameters, linear_flops
from leanformers.errors import LeanError
from leanformers.surgery.config import set_field
from leanformers.surgery.edit import Cost, Edit, edit


def keep_position_bias(layers: Sequence[Layer], staying: Sequence[Layer]) -> None:
    """T5 keeps the position bias of a whole stack in its first attention: it goes to the first that stays."""
    modules: list[Any] = [layer.attention.module for layer in layers]
    old = next((module for module in modules if getattr(module, "has_relative_attention_bias", False)), None)
    new: Any = next((layer.attention.module for layer in staying if not layer.attention.absent), None)
    if old is not None and new is not None and new is not old:
        new.relative_attention_bias = old.relative_attention_bias
        new.has_relative_attention_bias = True


@edit("drop_layers")
@dataclass(frozen=True, kw_only=True)
class DropLayers(Edit):
    """Keep the layers ``keep`` (ascending indices) of ``stack``; the rest is gone, config included."""

    keep: tuple[int, ...]
    stack: str = ""

    def _stack(self, anatomy: Anatomy) -> str:
        if self.stack:
            return self.stack
        if len(anatomy.stacks) > 1:
            raise LeanError(
                f'{type(anatomy.model).__name__} has an encoder and a decoder: say which with stack="encoder".'
            )
        return next(iter(anatomy.stacks))

    def _check(self, anatomy: Anatomy) -> str:
        anatomy.residual.check_droppable()
        stack = self._stack(anatomy)
        anatomy.stack_paths(stack)
        count = len(anatomy.stacks[stack])
        ascending = all(a < b for a, b in zip(self.keep, self.keep[1:], strict=False))
        if not self.keep or not ascending or self.keep[0] < 0 or self.keep[-1] >= count:
            raise LeanError(
                f"keep={list(self.keep)} does not name layers of the {stack}: "
                f"give ascending indices below {count}, at least one."
            )
        return stack

    def apply(self, anatomy: Anatomy, **tensors: object) -> None:
        stack = self._check(anatomy)
        paths = anatomy.stack_paths(stack)
        layers = anatomy.stacks[stack]
        keep_position_bias(layers, [layers[index] for index in self.keep])
        kept = [layers[index].module for index in self.keep]
        parent, _, name = paths.layers.rpartition(".")
        owner = anatomy.module(parent) if parent else anatomy.base
        setattr(owner, name, nn.ModuleList(kept))
        for field in paths.num_layers:
            if isinstance(getattr(owner, field, None), int):
                setattr(owner, field, len(kept))  # DistilBERT's stack counts for itself
        for index, layer in enumerate(kept):
            for module in layer.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = index
        self._set_config(anatomy, owner, paths.num_layers)

    def _set_config(self, anatomy: Anatomy, owner: nn.Module, fields: tuple[str, ...]) -> None:
        configs = [anatomy.model.config, anatomy.base.config, anatomy.config, getattr(owner, "config", None)]
        seen: set[int] = set()
        for config in configs:
            if config is None or id(config) in seen:
                continue
            seen.add(id(config))
            own = ("num_layers",) if config is not anatomy.model.config and "num_decoder_layers" in fields else fields
            for field in own:
                if hasattr(config, field):
                    set_field(anatomy.model, config, field, len(self.keep))
            if types := getattr(config, "layer_types", None):
                set_field(anatomy.model, config, "layer_types", [types[index] for index in self.keep])
            if stages := getattr(config, "stage_names", None):  # vision backbones name every layer
                names = stages[: len(self.keep) + 1]
                set_field(anatomy.model, config, "stage_names", names)
                set_field(anatomy.model, config, "_out_features", names[-1:])
                set_field(anatomy.model, config, "_out_indices", [len(names) - 1])

    def cost(self, anatomy: Anatomy) -> Cost:
        stack = self._check(anatomy)
        total = Cost()
        heir = any(not layer.attention.absent for layer in anatomy.stacks[stack] if layer.index in self.keep)
        for layer in anatomy.stacks[stack]:
            if layer.index in self.keep:
                continue
            shared = getattr(layer.attention.module, "relative_attention_bias", None) if heir else None
            own = count_parameters(layer.module)
            own -= count_parameters(shared) if isinstance(shared, nn.Module) else 0
            total += Cost(parameters=-own)
            for path in anatomy.roles:
                if path.startswith(layer.path + "."):
                    flops, count = linear_flops(anatomy.module(path)), anatomy.rows(path)
                    total += Cost(per_token=-flops * count.per_token, per_sequence=-flops * count.per_sequence)
            for attention in layer.attentions():
                width = attention.num_attention_heads * attention.head_dim
                bias = 2 * attention.position_terms * attention.positions * width
                total += Cost(per_pair=-4 * width, per_token=-bias)
        return total
