"""Methods, found by slug and imported only when asked for.

A method lives in `methods/<room>/<slug with underscores>.py`; a file placed there is found without a table.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from leanformers.errors import LeanError
from leanformers.methods.base import (
    NEEDS,
    STAGES,
    Budget,
    Choice,
    MethodInfo,
    Range,
    Saving,
    Setting,
    Subject,
    _registry,
    method,
    setting,
)

__all__ = [
    "NEEDS",
    "STAGES",
    "Budget",
    "Choice",
    "MethodInfo",
    "Range",
    "Saving",
    "Setting",
    "Subject",
    "build",
    "get",
    "method",
    "methods",
    "place",
    "setting",
    "slugs",
]

ROOMS = ("compress", "tune", "pretrain", "run")


def _modules() -> dict[str, str]:
    """Slug -> module of every method file, read from the folder without importing the files."""
    found = {}
    for room in ROOMS:
        spec = find_spec(f"{__name__}.{room}")
        for module in pkgutil.iter_modules(spec.submodule_search_locations if spec else None) if spec else ():
            if not module.name.startswith("_"):
                found[module.name.replace("_", "-")] = f"{__name__}.{room}.{module.name}"
    return found


def slugs() -> list[str]:
    """The names of all methods, sorted; nothing is imported."""
    return sorted({*_modules(), *_registry})


def get(slug: str) -> MethodInfo:
    """The method of that name; LeanError with the closest name if there is none."""
    if slug not in _registry and slug in (modules := _modules()):
        found = vars(import_module(modules[slug])).values()
        # The module may have been imported before, under another registry.
        for cls in found:
            if getattr(cls, "slug", None) == slug:
                _registry[slug] = cls.info
    if slug not in _registry:
        close = get_close_matches(str(slug), slugs(), n=1, cutoff=0.5)
        guess = f" (did you mean '{close[0]}'?)" if close else ""
        raise LeanError(f"there is no method '{slug}'{guess}; the methods are: {', '.join(slugs()) or 'none'}")
    return _registry[slug]


def methods() -> dict[str, MethodInfo]:
    """All methods by slug, in the order of their stages."""
    found = [get(slug) for slug in slugs()]
    return {info.slug: info for info in sorted(found, key=place)}


def place(info: MethodInfo) -> tuple[int, int, str]:
    """Sorting key: the order in which a search puts methods."""
    return STAGES.index(info.stage), info.order, info.slug


def build(step: Mapping[str, Any]) -> Any:
    """The method of a recipe's step, {"method": slug, **settings}, with its settings checked."""
    if not isinstance(step, Mapping) or "method" not in step:
        raise LeanError(f"a step of a recipe is a mapping with 'method' and its settings, not {step!r}")
    settings = {name: value for name, value in step.items() if name != "method"}
    return get(step["method"]).build(settings)
