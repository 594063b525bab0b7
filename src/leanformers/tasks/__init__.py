"""Tasks: data, loss and metric as one object, from the user's own files or packaged for offline use.

Names are looked up when first used, so that importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Task as Task
    from .checkpoints import MODELS as MODELS
    from .loading import has_new_head as has_new_head
    from .loading import load as load
    from .make import task as task
    from .packaged import PACKAGED as PACKAGED
    from .reference import Reference as Reference
    from .reference import tfidf as tfidf

_HOME = {
    "Task": "base",
    "MODELS": "checkpoints",
    "load": "loading",
    "has_new_head": "loading",
    "task": "make",
    "PACKAGED": "packaged",
    "Reference": "reference",
    "tfidf": "reference",
}
__all__ = ["MODELS", "PACKAGED", "Reference", "Task", "has_new_head", "load", "task", "tfidf"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
