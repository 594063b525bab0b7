"""The delta form: the edits, and only the tensors that differ from a base model's.

A delta folder loads like any checkpoint; what it does not hold is taken from the base, which must be the same
to the last bit.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError


def content_hash(model: Any) -> str:
    """SHA-256 over names, shapes, dtypes and values of the model's trunk (layers, embeddings, final norms)."""
    anatomy = Anatomy.of(model)
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(anatomy.trunk):
            data = tensor.detach().cpu().contiguous()
            total.update(f"{name.removeprefix(anatomy.prefix)} {list(data.shape)} {data.dtype}".encode())
            total.update(data.flatten().view(torch.uint8).numpy().tobytes() if data.numel() else b"")
    return total.hexdigest()


def save_delta(model: Any, folder: str | os.PathLike[str], base: str | os.PathLike[str]) -> None:
    """Write ``model`` as a delta on ``base``.

    Args:
        model: an edited or tuned model.
        folder: where to; must not exist.
        base: folder or name of the model that it came from.

    Raises:
        LeanError: the folder exists, or the base is of another architecture.
    """
    from safetensors.torch import save_file

    from leanformers.surgery.lean_config import ensure_ledger
    from leanformers.surgery.saving import finish

    target = Path(folder)
    if target.exists():
        raise LeanError(f"{target} exists already: give a new folder.")
    stock = _load_base(type(model), str(base), model.dtype)
    if stock.config.model_type != model.config.model_type:
        raise LeanError(f"{base} is a {stock.config.model_type}, the model a {model.config.model_type}: name its base.")
    theirs = stock.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    changed = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied and not _equal(tensor, theirs.get(name))
    }
    record = ensure_ledger(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    before = record.base
    try:
        record.base = {"name": str(base), "hash": content_hash(stock)}
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.save_pretrained(work)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(work)
        save_file(changed, work / "model.safetensors", metadata={"format": "pt"})
        finish(work, record)
        os.replace(work, target)
    finally:
        record.base = before
        shutil.rmtree(work, ignore_errors=True)


def fill(model: Any, missing: set[str], base: dict[str, str]) -> None:
    """Fill the tensors that a delta left out from its base; they leave ``missing``.

    Raises:
        LeanError: the base is not there, or has other contents than when the delta was written.
    """
    stock = _load_base(type(model), base["name"], model.dtype)
    if content_hash(stock) != base["hash"]:
        raise LeanError(
            f"This delta lies on another version of {base['name']}: its contents differ from those it names."
        )
    theirs = stock.state_dict()
    with torch.no_grad():
        for name in sorted(missing):
            source, parameter = theirs.get(name), model.state_dict().get(name)
            if source is not None and parameter is not None and source.shape == parameter.shape:
                parameter.copy_(source)
                missing.discard(name)


def _load_base(cls: Any, base: str, dtype: torch.dtype) -> Any:
    try:
        return cls.from_pretrained(base, dtype=dtype)
    except OSError:
        raise LeanError(f"The base model {base} is not there: put it back, or save the full form instead.") from None


def _equal(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and tensor.shape == other.shape and torch.equal(tensor.cpu(), other.cpu())
