"""Saving a lean model through its own ``save_pretrained``.

If the edits leave a model that transformers can describe by its config alone, a stock checkpoint is written,
without a ledger. Else config.json carries the ledger, the SHA-256 of the weight files, and the name of a
weight file that does not exist: transformers without leanformers then stops instead of loading something wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import MethodType
from typing import Any

from leanformers.anatomy import base_of
from leanformers.errors import LeanError
from leanformers.surgery.lean_config import LeanConfig

GUARD = "import-leanformers-first.safetensors"


def wrap_saving(model: Any) -> None:
    """Make ``save_pretrained`` write the ledger, of the model and of its base. Bound, so that a copy saves itself."""
    for part in (model, base_of(model)):
        if "save_pretrained" not in part.__dict__:
            part.save_pretrained = MethodType(_save_pretrained, part)


def unwrap_saving(model: Any) -> None:
    """Undo ``wrap_saving``."""
    for part in (model, base_of(model)):
        part.__dict__.pop("save_pretrained", None)


def _save_pretrained(model: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    from leanformers.surgery.stock import stock_config

    if kwargs.pop("push_to_hub", False):
        raise LeanError("Save to a folder first and upload that: a lean checkpoint is completed after its weights.")
    plain = type(model).save_pretrained
    config = stock_config(model)
    if config is not None:
        return _save_stock(model, config, plain, save_directory, *args, **kwargs)
    record = model.config.quantization_config
    record.files = {}
    # Old names of a family's checkpoints fit its old modules, not the parts that edits put in place.
    kwargs.setdefault("save_original_format", False)
    result = plain(model, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        finish(Path(save_directory), record)
    return result


def _save_stock(model: Any, config: Any, plain: Any, *args: Any, **kwargs: Any) -> Any:
    lean, quantizer = model.config, model.__dict__.pop("hf_quantizer", None)
    try:
        model.config = config
        return plain(model, *args, **kwargs)
    finally:
        model.config = lean
        if quantizer is not None:
            model.hf_quantizer = quantizer


def finish(folder: Path, record: LeanConfig) -> None:
    """Complete a lean checkpoint: digests and guard go into config.json, last and in one step."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    files = {file.name: digest(file) for file in sorted(folder.glob("*.safetensors"))}
    config["quantization_config"] = {**record.to_dict(), "files": files}
    config["transformers_weights"] = GUARD
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_files(checkpoint_files: list[str] | None, record: LeanConfig) -> None:
    """Compare the weight files with the digests that the ledger holds.

    Raises:
        LeanError: no digests (the checkpoint was never finished), or a file that was cut short or altered.
    """
    if not checkpoint_files:
        return
    if not record.files:
        raise LeanError(
            f"{Path(checkpoint_files[0]).parent} holds an unfinished checkpoint (no digests in config.json): "
            "save it again."
        )
    for name in checkpoint_files:
        file = Path(name)
        expected = record.files.get(file.name)
        if expected is None or digest(file) != expected:
            raise LeanError(f"{file} was cut short or altered since it was written: fetch or write it again.")
