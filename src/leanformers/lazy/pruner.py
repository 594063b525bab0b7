"""What stands on a model that prunes: a `Pruner` at the layers that do, hooks on all layers, and its own `generate`.

Nothing of it acts unless the model is called with a `LazyCache`, which its `generate` makes: a forward pass without
one (training, scoring every position of a text, export) is the dense model's. The stock loop over the layers runs on;
before each layer the hooks bring back the tokens that are needed, after it they take out those that are not.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from leanformers.anatomy import Anatomy, base_of
from leanformers.anatomy.families import find
from leanformers.errors import LeanError
from leanformers.lazy.generation import generate
from leanformers.parts.attention import switch_on


class Pruner(nn.Module):
    """Says that the layer which holds it as ``pruner`` lets the share ``rate`` of its tokens go."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def put_pruner(anatomy: Anatomy, layer: nn.Module, rate: float) -> None:
    """Let ``layer`` prune, in place of what it pruned before, and make the whole model able to run so."""
    model: Any = anatomy.model
    layer.pruner = Pruner(rate)
    loop = _loop(anatomy.base, anatomy.family.stacks[0].layers)
    if _begin not in loop._forward_pre_hooks.values():
        loop.register_forward_pre_hook(_begin, with_kwargs=True)
    for one in anatomy.layers:
        if _enter not in one.module._forward_pre_hooks.values():
            one.module.register_forward_pre_hook(_enter, with_kwargs=True)
            one.module.register_forward_hook(_leave, with_kwargs=True)
    if hasattr(model, "can_generate") and model.can_generate():
        model.generate = MethodType(generate, model)
    switch_on(model)


def layers_of(model: Any) -> list[Any]:
    """The layers of a model with pruners.

    Raises:
        LeanError: it has none.
    """
    base = base_of(model)
    family = find(model.config.model_type)
    path = family.stacks[0].layers if family is not None else ""
    if family is None or _begin not in _loop(base, path)._forward_pre_hooks.values():
        raise LeanError(f"{type(model).__name__} does not prune tokens: apply the method 'lazyllm' to it first.")
    return list(base.get_submodule(path).children())


def _loop(base: nn.Module, layers: str) -> nn.Module:
    """The module that runs the layers one after another: of OPT it is the decoder, which its head calls directly."""
    return base.get_submodule(layers.rpartition(".")[0])


# -- hooks: functions of the module, so that a copy of the model has its own ---------------------------------------


def _cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The lazy cache among the arguments of a module, None where there is none."""
    from leanformers.lazy.cache import LazyCache

    return next((one for one in (*kwargs.values(), *args) if isinstance(one, LazyCache)), None)


def _begin(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = _cache(args, kwargs)
    if cache is not None:
        cache.begin(base, args, kwargs)


def _enter(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    cache = _cache(args, kwargs)
    return None if cache is None else cache.enter(layer, args, kwargs)


def _leave(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    cache = _cache(args, kwargs)
    return None if cache is None else cache.leave(layer, output)
