"""Encoders without padding: `pack(model)`."""

from leanformers.packing.index import Index
from leanformers.packing.model import is_packed, pack
from leanformers.packing.support import refusal

__all__ = ["Index", "is_packed", "pack", "refusal"]
