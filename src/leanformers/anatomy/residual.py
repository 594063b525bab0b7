"""The residual stream of a model: what starts it, reads it, writes it and norms it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from leanformers.anatomy import flops as _flops
from leanformers.anatomy.parts import Norm, Projection, is_linear, linear_shape
from leanformers.anatomy.reading import has
from leanformers.errors import LeanError

if TYPE_CHECKING:
    from leanformers.anatomy.anatomy import Anatomy


@dataclass(frozen=True, eq=False)
class Residual:
    """The ends of the stream, as ``Anatomy.residual``. Its width is the anatomy's ``hidden_size``."""

    anatomy: Anatomy

    @property
    def reads(self) -> list[Projection]:
        """Projections of the layers whose input is the (normed) residual stream, those of cross-attention and
        of relative positions included; ``outputs`` are the readers after the layers."""
        reads: list[Projection] = []
        for layer in self.anatomy.layers:
            for attention in layer.attentions():
                reads += [attention.query, attention.key, attention.value, *attention.extra]
            reads += [part for role, part in layer.feed_forward.projections() if role != "down"]
        return reads

    @property
    def writes(self) -> list[Projection]:
        """Projections of the layers whose output is added to the residual stream (through a norm or a gain
        where the layer has one at the ``output``); ``tables`` and ``inputs`` are what starts the stream."""
        writes: list[Projection] = []
        for layer in self.anatomy.layers:
            writes += [attention.output for attention in layer.attentions()]
            writes += [part for role, part in layer.feed_forward.projections() if role == "down"]
        return writes

    @property
    def tables(self) -> dict[str, nn.Parameter]:
        """The parameters [..., hidden_size] that are added to the stream, by path, tied ones once."""
        named = dict(self.anatomy.base.named_parameters(remove_duplicate=False))
        tables: dict[int, tuple[str, nn.Parameter]] = {}
        for path in self.anatomy.family.writes:
            tensor = named.get(path)
            if tensor is not None and tensor.shape[-1] == self.anatomy.hidden_size:
                tables.setdefault(id(tensor), (path, tensor))
        return dict(tables.values())

    @property
    def inputs(self) -> dict[str, nn.Module]:
        """The linears and convolutions outside the layers that write to the stream, by path."""
        return {path: self.anatomy.module(path) for path in self.anatomy.family.inputs if has(self.anatomy.base, path)}

    @property
    def fixed_width(self) -> str | None:
        """A part that holds the stream at its full width (``Family.fixed_width``), by name; None without one."""
        owners = (self.anatomy.base, self.anatomy.model)
        paths = self.anatomy.family.fixed_width
        return next((path for path in paths if any(has(owner, path) for owner in owners)), None)

    @property
    def outputs(self) -> dict[str, Projection]:
        """The linears outside the layers that read the stream, by name in the whole model: of poolers,
        language-model and classification heads."""
        of, outputs = self.anatomy, dict[str, Projection]()
        for path in of.family.outputs:
            for owner, name in ((of.base, f"{of.prefix}{path}"), (of.model, path)):
                module = owner.get_submodule(path) if has(owner, path) else None
                if module is not None and is_linear(module) and linear_shape(module)[1] == of.hidden_size:
                    outputs[name] = Projection(name, module)
        if all(output.module is of.head for output in outputs.values()):
            # No pooler and no head of its own: the heads of other tasks (token classes, spans) read the stream.
            for name, module in _flops.outer_linears(of.model):
                around = of.base is not of.model and not name.startswith(of.prefix)
                if around and module is not of.head and linear_shape(module)[1] == of.hidden_size:
                    outputs.setdefault(name, Projection(name, module))
        return outputs

    @property
    def rotated(self) -> bool:
        """Whether the stream is in another basis at each position (``SliceResidual``): its norms have no gain, and
        its layers belong together."""
        return any(isinstance(getattr(norm.module, "width", None), int) for norm in self.anatomy.norms)

    def check_droppable(self) -> None:
        """Raises:
        LeanError: the stream is rotated, and a dropped sub-layer's change of basis would be missing.
        """
        if self.rotated:
            raise LeanError(
                f"The residual stream of {type(self.anatomy.model).__name__} changes its basis at each sub-layer: drop "
                "layers and sub-layers before it is rotated."
            )

    def gain(self, norm: Norm) -> torch.Tensor:
        """What a norm multiplies by, [hidden_size], Gemma's offset included."""
        weight = norm.module.lambda1 if norm.place == "scale" else norm.module.weight
        if weight is None:
            return torch.ones(self.anatomy.hidden_size)
        return 1 + weight if self.anatomy.family.norm_offset else weight

    def readers(self, norm: Norm) -> list[Projection]:
        """The projections that read this norm's output, where its gain can be folded in.

        Empty for norms whose output goes on as the residual stream (``post``, ``embedding``) and for those
        on a sub-layer's output.
        """
        if norm.place == "final":
            if norm.reads == "encoder" and "decoder" in self.anatomy.stacks:
                crossing = [one for layer in self.anatomy.layers for one in layer.attentions() if one.cross]
                return [projection for attention in crossing for projection in (attention.key, attention.value)]
            return list(self.outputs.values())
        if norm.place != "pre":
            return []
        layer = next(layer for layer in self.anatomy.layers if norm in layer.norms)
        if norm.reads == "feed_forward":
            return [part for role, part in layer.feed_forward.projections() if role != "down"]
        if norm.reads == "cross_attention":
            return [layer.cross_attention.query] if layer.cross_attention else []
        return [layer.attention.query, layer.attention.key, layer.attention.value]
