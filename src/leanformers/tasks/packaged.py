"""The packaged tasks by name: data that needs no hub."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Task

# name -> module and function, imported when asked for
PACKAGED = {
    "sentiment": ("sentiment", "sentiment"),
    "sentiment-rating": ("sentiment", "sentiment_rating"),
    "docstrings-search": ("docstrings", "docstrings_search"),
    "docstrings-lm": ("docstrings", "docstrings_lm"),
    "docstrings-library": ("docstrings", "docstrings_library"),
}


def packaged(name: str) -> Callable[..., Task]:
    """The function that makes the packaged task of this name; its keyword arguments are the options."""
    module, function = PACKAGED[name]
    return getattr(import_module(f".{module}", __package__), function)
