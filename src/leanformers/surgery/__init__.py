"""How to change the parts of a model: edits, the ledger, saving and loading.

Names load on first use, so that importing the plug-in's hook does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leanformers.surgery.delta import content_hash, save_delta
    from leanformers.surgery.edit import Cost, Edit, edit_types, from_json
    from leanformers.surgery.edits import (
        DropLayers,
        DropSublayers,
        FactoriseLinear,
        KeepHeads,
        KeepNeurons,
        KeepVocabulary,
        MaskWeights,
        PrunePrompt,
        QuantiseEmbeddings,
        QuantiseLinear,
        ReduceTokens,
        SliceResidual,
        SwapAttention,
    )
    from leanformers.surgery.lean_config import apply, ledger
    from leanformers.surgery.stock import stock_config, tier

_WHERE = {
    "Cost": "edit",
    "Edit": "edit",
    "edit_types": "edit",
    "from_json": "edit",
    "apply": "lean_config",
    "ledger": "lean_config",
    "stock_config": "stock",
    "tier": "stock",
    "save_delta": "delta",
    "content_hash": "delta",
    "DropLayers": "edits",
    "DropSublayers": "edits",
    "FactoriseLinear": "edits",
    "KeepHeads": "edits",
    "KeepNeurons": "edits",
    "KeepVocabulary": "edits",
    "MaskWeights": "edits",
    "PrunePrompt": "edits",
    "QuantiseEmbeddings": "edits",
    "QuantiseLinear": "edits",
    "ReduceTokens": "edits",
    "SliceResidual": "edits",
    "SwapAttention": "edits",
}

__all__ = [
    "Cost",
    "DropLayers",
    "DropSublayers",
    "Edit",
    "FactoriseLinear",
    "KeepHeads",
    "KeepNeurons",
    "KeepVocabulary",
    "MaskWeights",
    "PrunePrompt",
    "QuantiseEmbeddings",
    "QuantiseLinear",
    "ReduceTokens",
    "SliceResidual",
    "SwapAttention",
    "apply",
    "content_hash",
    "edit_types",
    "from_json",
    "ledger",
    "save_delta",
    "stock_config",
    "tier",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"leanformers.surgery.{_WHERE[name]}")
    importlib.import_module("leanformers.surgery.edits")  # the registry is complete before a ledger is read
    return getattr(module, name)
