"""From token states to one vector, and the files by which sentence-transformers knows how.

A model that pools by anything but the mean says so in its config (`sentence_pooling`), so the choice travels
with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import LeanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLAGS = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}  # ours -> in old config files


def pool(states: Tensor, attention_mask: Tensor, mode: str = "mean") -> Tensor:
    """Token states [batch, length, hidden_size] to vectors [batch, hidden_size]; padding plays no part."""
    mask = attention_mask[:, :, None].to(states.dtype)
    if mode == "cls":
        return states[:, 0]
    if mode == "lasttoken":
        last = attention_mask.sum(1) - 1  # padding is on the right
        return states[torch.arange(len(states), device=states.device), last]
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1)


def pooling_of(folder: Path) -> str:
    """The pooling that a sentence-transformers folder states, in its old or its new form."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    stated = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(stated.get("pooling_mode"), str):
        return stated["pooling_mode"]
    ours = {flag: mode for mode, flag in _FLAGS.items()}
    flags = [key.removeprefix("pooling_mode_") for key, on in stated.items() if "pooling_mode_" in key and on]
    return "+".join(ours.get(flag, flag) for flag in flags) or "mean"


def note_pooling(model: PreTrainedModel, folder: Path) -> None:
    """Put how a sentence-transformers folder pools onto the model's config; without such files, the mean.

    Raises:
        LeanError: the folder ends in a module or pools in a way that is not known here.
    """
    if not (folder / "modules.json").is_file():
        return
    for module in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        part = str(module.get("type", "")).rsplit(".", 1)[-1]
        if part not in ("Transformer", "Pooling", "Normalize"):
            raise LeanError(f"{folder} ends in a {part} module after its pooling, which leanformers does not keep.")
    mode = pooling_of(folder)
    if mode not in _FLAGS:
        raise LeanError(f"{folder} pools by {mode!r}; leanformers knows {', '.join(_FLAGS)}.")
    if mode != "mean":
        model.config.sentence_pooling = mode


def write_modules(folder: Path, max_length: int, query_prefix: str = "", body_prefix: str = "") -> None:
    """The files by which `SentenceTransformer(folder)` opens a saved model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    mode = config.get("sentence_pooling", "mean")
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    pooling: dict[str, Any] = {"word_embedding_dimension": config.get("hidden_size", config.get("dim"))}
    pooling |= {f"pooling_mode_{flag}": mode == ours for ours, flag in _FLAGS.items()}
    prompts = {"query": query_prefix, "document": body_prefix}
    named = {name: prompt for name, prompt in prompts.items() if prompt}
    _write(folder / "modules.json", listed)
    _write(folder / "1_Pooling" / "config.json", pooling)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    _write(folder / "config_sentence_transformers.json", {"prompts": named, "similarity_fn_name": "cosine"})


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
