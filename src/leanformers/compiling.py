"""`torch.compile` with dynamic shapes, as leanformers uses it everywhere: one graph for all sizes, and never a silent
return to eager.

Each function gets a compilation cache of its own. Dynamo otherwise counts recompilations per *code object*, which
all models of a class share: a search over a dozen BERTs would meet the limit and run eagerly without a word. Past the
limit it raises here instead of falling back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

RECOMPILE_LIMIT = 64
_ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters  # came after torch 2.11
R = TypeVar("R")


def compile_dynamic(function: Callable[..., R], *, fullgraph: bool = False) -> Callable[..., R]:
    """The function, compiled at its first call; `fullgraph` makes a graph break an error."""
    from torch._dynamo import config

    options: dict[str, Any] = {"dynamic": True, "fullgraph": fullgraph}
    limits: dict[str, Any] = {"fail_on_recompile_limit_hit": True, "accumulated_recompile_limit": 1 << 16}
    if _ISOLATES:
        options |= {"isolate_recompiles": True, "recompile_limit": RECOMPILE_LIMIT}
    else:
        limits["recompile_limit"] = 1 << 12
    compiled = torch.compile(function, **options)

    def call(*args: Any, **kwargs: Any) -> R:
        with config.patch(**limits):
            return compiled(*args, **kwargs)

    return call
