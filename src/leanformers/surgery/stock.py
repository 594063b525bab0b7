"""Whether an edited model is one that transformers can describe by its config alone."""

from __future__ import annotations

import copy
from typing import Any

import torch

from leanformers.anatomy import Anatomy
from leanformers.surgery.lean_config import ledger_of

_IGNORED = {
    "training",
    "gradient_checkpointing",
    "is_quantized",
    "quantization_method",
    "padding_idx",
    "name_or_path",
}


def tier(model: Any) -> str:
    """What loads the model's checkpoint: ``stock`` (transformers alone) or ``lean`` (after the import)."""
    return "lean" if ledger_of(model.config) is not None and stock_config(model) is None else "stock"


def stock_config(model: Any) -> Any | None:
    """A config from which transformers builds exactly this structure, or None.

    The claim is tested: a skeleton is built from the config and compared with the model, tensor by tensor and
    module by module.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        _describe(Anatomy.of(model), config)
        if hasattr(config, "validate"):
            config.validate()  # saving does, and would refuse
        with torch.device("meta"):
            skeleton = type(model)(config)
    except Exception:  # a config that the family's validators refuse describes nothing
        return None
    return config if _same(model, skeleton) else None


def _describe(anatomy: Anatomy, config: Any) -> None:
    """Write sizes that all layers of a stack share into the config."""
    if hasattr(config, "hidden_size") and config.hidden_size != anatomy.hidden_size:
        config.hidden_size = anatomy.hidden_size
    for name, layers in anatomy.stacks.items():
        widths = {layer.feed_forward.intermediate_size for layer in layers}
        heads = {(a.num_attention_heads, a.num_key_value_heads) for layer in layers for a in layer.attentions()}
        only = len(anatomy.stacks) == 1
        if len(widths) == 1:
            width = widths.pop()
            fields = [f"{name}_ffn_dim"] + (["intermediate_size", "ffn_dim", "n_inner", "hidden_dim"] if only else [])
            for field in [*fields, "d_ff"]:
                if hasattr(config, field) and _width(config, field, anatomy) != width:
                    setattr(config, field, width)
        if len(heads) == 1 and only:
            queries, groups = heads.pop()
            if hasattr(config, "head_dim") or anatomy.family.stock_heads == "fixed_head_dim":
                config.head_dim = layers[0].attention.head_dim
            for field, value in (("num_attention_heads", queries), ("num_key_value_heads", groups)):
                if hasattr(config, field):
                    setattr(config, field, value)


def _width(config: Any, field: str, anatomy: Anatomy) -> int | None:
    value = getattr(config, field)
    return 4 * anatomy.hidden_size if value is None and field == "n_inner" else value


def _same(model: Any, skeleton: Any) -> bool:
    ours, theirs = model.state_dict(), skeleton.state_dict()
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        return False
    ours_modules, theirs_modules = dict(model.named_modules()), dict(skeleton.named_modules())
    if set(ours_modules) != set(theirs_modules):
        return False
    for name, module in ours_modules.items():
        other = theirs_modules[name]
        if _kind(module) != _kind(other) or _settings(module) != _settings(other):
            return False
    return True


def _kind(module: Any) -> tuple[str, str]:
    """The class by name: torch makes a new one for each parametrised module (wav2vec2's convolution)."""
    return type(module).__module__, type(module).__qualname__


def _settings(module: Any) -> dict[str, Any]:
    plain = (int, float, bool, str, type(None))
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, plain) and not key.startswith("_") and key not in _IGNORED
    }
