"""Prompts that are finished only where the next token looks: LazyLLM's cache, and what runs a model on it."""

from leanformers.lazy.cache import LazyCache
from leanformers.lazy.pruner import Pruner, put_pruner
from leanformers.lazy.schedule import mean_keep, predicted_speedup, shares, spread
from leanformers.lazy.support import refusal

__all__ = ["LazyCache", "Pruner", "mean_keep", "predicted_speedup", "put_pruner", "refusal", "shares", "spread"]
