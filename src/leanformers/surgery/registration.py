"""Puts the plug-in into transformers' registries."""

from __future__ import annotations

from types import ModuleType

from leanformers.surgery.lean_config import METHOD, LeanConfig
from leanformers.surgery.quantizer import LeanQuantizer


def register(auto: ModuleType) -> None:
    """Register with ``transformers.quantizers.auto``, once."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(LeanConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(LeanQuantizer)
