"""Make a transformer that you already have cheap: to pretrain, to tune, to store, to run.

A lean model is a stock Hugging Face model plus an ordered list of edits. Importing this package lets
transformers load one (`AutoModel….from_pretrained(dir)`); the names below are loaded when first used,
so that the import itself costs nothing.

    import leanformers as lean

    frontier = lean.slim("./my-bert", task, goals=["latency<=0.5x", "quality>=0.99x"], out="runs/mine")
    model = lean.apply([{"method": "greenformers", "rank": 0.5}], model)
    model = lean.pack(model)  # an encoder without padding: the same outputs, sooner
    model = lean.prepack(model)  # a decoder whose generate prefills without padding: the same tokens, sooner
    lean.edit(model, edit) · lean.ledger(model) · lean.measure(model, task) · lean.Anatomy.of(model)
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from leanformers.errors import LeanError
from leanformers.surgery import hook

if TYPE_CHECKING:
    from leanformers.advisor import advise
    from leanformers.anatomy import Anatomy
    from leanformers.deploy import export
    from leanformers.frontier import Frontier
    from leanformers.frontier.slim import slim
    from leanformers.measure import Measurement, compare, measure
    from leanformers.methods import Subject, method, methods
    from leanformers.methods.run.latency_adjustable import set_speedup
    from leanformers.packing import pack, prefill, prepack
    from leanformers.recipe import Recipe, apply
    from leanformers.surgery import apply as edit
    from leanformers.surgery import ledger, tier
    from leanformers.tasks import Task, load, task

__version__ = "0.1.0"

# Public name -> the room that holds it (and its name there, where that differs).
_PUBLIC = {
    "slim": "leanformers.frontier",
    "Frontier": "leanformers.frontier",
    "apply": "leanformers.recipe",
    "Recipe": "leanformers.recipe",
    "export": "leanformers.deploy",
    "pack": "leanformers.packing",
    "prefill": "leanformers.packing",
    "prepack": "leanformers.packing",
    "set_speedup": "leanformers.methods.run.latency_adjustable",
    "edit": "leanformers.surgery:apply",
    "ledger": "leanformers.surgery",
    "tier": "leanformers.surgery",
    "Anatomy": "leanformers.anatomy",
    "measure": "leanformers.measure",
    "compare": "leanformers.measure",
    "Measurement": "leanformers.measure",
    "advise": "leanformers.advisor",
    "methods": "leanformers.methods",
    "method": "leanformers.methods",
    "Subject": "leanformers.methods",
    "task": "leanformers.tasks",
    "Task": "leanformers.tasks",
    "load": "leanformers.tasks",
}

# What the documentation imports from, beside the names above.
_ROOMS = ("anatomy", "deploy", "frontier", "recipe", "runtimes", "surgery", "tasks", "training")

__all__ = [
    "LeanError", "__version__",
    "slim", "Frontier", "apply", "Recipe", "export", "pack", "prefill", "prepack", "set_speedup", "edit", "ledger",
    "tier", "Anatomy", "measure", "compare", "Measurement", "advise", "methods", "method", "Subject", "task", "Task",
    "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used (PEP 562)."""
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room, _, there = _PUBLIC[name].partition(":")
    module = importlib.import_module(room)
    # A room named like the function in it (measure, methods) stays the room, and can be called: see below.
    value = module if room == f"{__name__}.{name}" else getattr(module, there or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS})


class _CallableRoom(ModuleType):
    """A room named like its main function: `lean.measure(…)` calls it, `lean.measure.…` looks into it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """The import system sets each room on the package; one named like a function in it becomes callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if type(value) is ModuleType and _PUBLIC.get(name) == value.__name__:
            value.__class__ = _CallableRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

# From here on transformers can load lean folders. It costs nothing: it waits for transformers to be imported.
hook.install()
