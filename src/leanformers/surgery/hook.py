"""Registers the plug-in with transformers when transformers gets to load its quantisers, not before.

That keeps ``import leanformers`` as cheap as ``import transformers``: loading the quantisers imports torch.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_TARGET = "transformers.quantizers.auto"


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _register(module: ModuleType) -> None:
    """Put names in the registries; the classes are imported when first asked for."""
    from leanformers.surgery import registration

    registration.register(module)


def install() -> None:
    """Register now if transformers' quantisers are loaded, else when they are. Safe to call twice."""
    loaded = sys.modules.get(_TARGET)
    if loaded is not None and hasattr(loaded, "AUTO_QUANTIZER_MAPPING"):
        _register(loaded)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
