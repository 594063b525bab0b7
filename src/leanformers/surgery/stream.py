"""The residual stream as surgery sees it: every tensor that is as wide as the stream, and how to cut them together.

Anatomy knows the readers, writers, tables and norms; what is added here are the transforms of masked language models
(whose output meets the tied embeddings, so it has the stream's coordinates) and the attributes that name the width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from leanformers.anatomy import Anatomy, is_linear, linear_shape
from leanformers.errors import LeanError
from leanformers.parts.linear import LowRankLinear
from leanformers.surgery.config import set_field
from leanformers.surgery.edit import Cost
from leanformers.surgery.linears import Cut, cut
from leanformers.surgery.tying import tied_names

_WIDTHS = ("hidden_size", "embed_dim", "d_model", "dim", "embedding_dim")
"""Attributes by which modules remember the width of the stream."""


@dataclass(frozen=True, eq=False)
class Stream:
    """The stream of a model, to be cut to ``size`` dimensions.

    ``readers`` and ``writers`` are linears by path (outside the base model by name in the whole model);
    ``convolutions`` write along their first axis; ``tables`` are parameters [..., width] by path.
    """

    anatomy: Anatomy
    width: int
    size: int
    readers: dict[str, nn.Module]
    writers: dict[str, nn.Module]
    convolutions: dict[str, Any]
    tables: dict[str, nn.Parameter]
    norms: list[Any]

    @classmethod
    def of(cls, anatomy: Anatomy, size: int) -> Stream:
        """Raises:
        LeanError: a part of the model cannot follow another width.
        """
        _check(anatomy, size)
        width = anatomy.hidden_size
        outputs = {name: one.module for name, one in anatomy.residual.outputs.items()}
        transforms = _transforms(anatomy, outputs)
        readers = {one.path: one.module for one in anatomy.residual.reads} | outputs
        writers = {one.path: one.module for one in anatomy.residual.writes} | transforms
        writers |= {path: module for path, module in anatomy.residual.inputs.items() if is_linear(module)}
        convolutions = {path: module for path, module in anatomy.residual.inputs.items() if not is_linear(module)}
        modules = {id(norm.module): norm.module for norm in anatomy.norms}
        if transforms:
            modules |= {id(module): module for module in _outside(anatomy) if isinstance(module, nn.LayerNorm)}
        norms = [m for m in modules.values() if any(p.shape == (width,) for p in m.parameters(recurse=False))]
        return cls(anatomy, width, size, readers, writers, convolutions, anatomy.residual.tables, norms)

    # -- cutting -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def keep(self, index: torch.Tensor) -> None:
        """Keep the dimensions ``index`` (int64, [size], ascending) in every tensor, or refuse and change nothing."""
        shared = {id(table) for table in self.tables.values()}
        own = {path: m for path, m in self.readers.items() if id(getattr(m, "weight", None)) not in shared}
        cuts = [Cut(path, module, 1, index) for path, module in own.items()]
        cuts += [Cut(path, module, 0, index) for path, module in self.writers.items()]
        cut(cuts)
        for module in self.convolutions.values():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, _narrowed(parameter, 0, index))
            module.out_channels = self.size
        replaced = {id(table): _narrowed(table, -1, index) for table in self.tables.values()}
        put(self.anatomy.model, replaced)
        for module in self.norms:
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, _narrowed(parameter, 0, index))
            if hasattr(module, "normalized_shape"):
                module.normalized_shape = (self.size,)
        self.rename()

    def rename(self) -> None:
        """Tell modules and config of the new width."""
        tables = set(map(id, self.anatomy.residual.tables.values()))  # of the new width by now
        for module in self.anatomy.model.modules():
            if isinstance(module, nn.Embedding) and id(module.weight) not in tables:
                continue
            for name in _WIDTHS:
                if isinstance(getattr(module, name, None), int) and getattr(module, name) == self.width:
                    setattr(module, name, self.size)
            if isinstance(module, nn.Linear) and module.weight.shape[1] == self.size and id(module.weight) in tables:
                module.in_features = self.size  # a tied head
        set_width(self.anatomy, self.size)

    # -- cost --------------------------------------------------------------------------------------------

    def cost(self) -> Cost:
        """What ``keep`` changes: parameters, and FLOPs of layers and heads."""
        gone, total = self.width - self.size, Cost()
        shared = {id(table) for table in self.tables.values()}
        for path, module in {**self.readers, **self.writers}.items():
            out_gone, in_gone = (gone if path in side else 0 for side in (self.writers, self.readers))
            weights, biases = _smaller(module, out_gone, in_gone)
            rows = self.anatomy.rows(path.removeprefix(self.anatomy.prefix))
            tied = id(getattr(module, "weight", None)) in shared
            total += Cost(
                parameters=-biases if tied else -weights - biases,
                per_token=-2 * weights * rows.per_token,
                per_sequence=-2 * weights * rows.per_sequence,
            )
        parameters = sum(p.numel() // len(p) for m in self.convolutions.values() for p in m.parameters(recurse=False))
        parameters += sum(table.numel() // table.shape[-1] for table in self.tables.values())
        parameters += sum(1 for norm in self.norms for _ in norm.parameters(recurse=False))
        return total + Cost(parameters=-gone * parameters)


def put(model: nn.Module, replaced: dict[int, nn.Parameter]) -> None:
    """Put new parameters in place of others, given by ``id``, under every name that they have."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in replaced:
                setattr(module, name, replaced[id(parameter)])


def set_width(anatomy: Anatomy, size: int) -> None:
    """Write the width into the configs, where that says nothing else.

    A decoder's config without a head size of its own derives rotary tables and caches from the width: it keeps the
    old one, as does a config whose validators refuse the new one.
    """
    model: Any = anatomy.model
    configs: dict[int, Any] = {id(config): config for config in (model.config, anatomy.base.config, anatomy.config)}
    configs |= {id(m.config): m.config for m in anatomy.base.children() if hasattr(m, "config")}
    for config in configs.values():
        before = getattr(config, "hidden_size", None)
        if before is None or (anatomy.causal and getattr(config, "head_dim", None) is None):
            continue
        config.hidden_size = size
        try:
            if hasattr(config, "validate"):
                config.validate()
        except Exception:
            continue
        finally:
            config.hidden_size = before
        set_field(model, config, getattr(config, "attribute_map", {}).get("hidden_size", "hidden_size"), size)


def _check(anatomy: Anatomy, size: int) -> None:
    name = type(anatomy.model).__name__
    if anatomy.embeddings is not None and not isinstance(anatomy.embeddings, nn.Embedding):
        raise LeanError(
            f"The embeddings of {name} are a {type(anatomy.embeddings).__name__}: slice the residual stream before "
            "other edits on them."
        )
    if part := anatomy.residual.fixed_width:
        raise LeanError(
            f"{part} of {name} works on the whole width of the residual stream in a way that no slice can follow: "
            "slice a model without it."
        )
    named = dict(anatomy.base.named_parameters(remove_duplicate=False))
    narrow = {path: named[path].shape[-1] for path in anatomy.family.writes if path in named}
    for path, width in narrow.items():
        if width == size != anatomy.hidden_size:
            raise LeanError(
                f"{path} of {name} is {width} wide, which would not be told from a residual stream of {size}: "
                "slice to another size."
            )


def _outside(anatomy: Anatomy) -> Iterator[nn.Module]:
    """Modules around the base model: heads and their norms."""
    inside = {id(module) for module in anatomy.base.modules()}
    yield from (module for module in anatomy.model.modules() if id(module) not in inside)


def _transforms(anatomy: Anatomy, outputs: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The linears between the stream and a head that is tied to embeddings of the stream's width."""
    model, head, width = anatomy.model, anatomy.head, anatomy.hidden_size
    if head is None or any(module is head for module in outputs.values()) or not is_linear(head):
        return {}
    tied = tied_names(model)
    own = {f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if module is head}
    if not own & tied or linear_shape(head)[1] != width:
        return {}
    around = {id(module) for module in _outside(anatomy)}
    return {name: m for name, m in outputs.items() if id(m) in around and linear_shape(m)[0] == width}


def _narrowed(parameter: nn.Parameter, axis: int, index: torch.Tensor) -> nn.Parameter:
    data = parameter.data.index_select(axis, index.to(parameter.device)).contiguous()
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def _smaller(module: nn.Module, out_gone: int, in_gone: int) -> tuple[int, int]:
    """Weights and biases that a linear of any make loses with some outputs and inputs."""
    out_features, in_features = linear_shape(module)
    if isinstance(module, LowRankLinear):
        weights = module.rank * (out_gone + in_gone)
    else:
        weights = out_features * in_features - (out_features - out_gone) * (in_features - in_gone)
    return weights, out_gone if getattr(module, "bias", None) is not None else 0
