"""Encoders without padding, `pack(model)`, and decoders' prompts, `prepack(model)` and `prefill(model, …)`."""

from leanformers.packing.bins import first_fit_decreasing
from leanformers.packing.generating import is_prepacked, prepack
from leanformers.packing.index import Index
from leanformers.packing.model import is_packed, pack
from leanformers.packing.prefilling import Prefilled, prefill
from leanformers.packing.support import refusal, refusal_to_prefill

__all__ = [
    "Index",
    "Prefilled",
    "first_fit_decreasing",
    "is_packed",
    "is_prepacked",
    "pack",
    "prefill",
    "prepack",
    "refusal",
    "refusal_to_prefill",
]
