"""Folders of exported models: the graph, configs and tokenizer, opened again by transformers alone.

An encoder's graph lies where sentence-transformers looks for it: `onnx/model.onnx` or
`openvino/openvino_model.xml`, beside the `modules.json` of an embedder. transformers' own manifest,
`export.json`, names that place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from leanformers.errors import LeanError
from leanformers.folders import write_json
from leanformers.runtimes.exported import exporter_class, missing
from leanformers.runtimes.hushing import hushed
from leanformers.runtimes.running import options

MANIFEST = "export.json"
ENCODERS = ("embedding", "text-classification", "text-regression", "masked-lm")


def save(exported: Any, folder: str | Path, task: Any = None, tokenizer: Any = None) -> Path:
    """Write an `ExportedModel` to `folder`, which the caller names and renames.

    Args:
        exported: from `export_model` or `export_generation`.
        task: its kind decides the layout, and an embedder's gets the files of sentence-transformers.
        tokenizer: saved beside the graph.

    Returns:
        The folder.
    """
    target = Path(folder)
    with hushed():
        exported.save_pretrained(target)
        if task is not None and tokenizer is not None:
            task.save_extras(target, tokenizer)
        elif tokenizer is not None:
            tokenizer.save_pretrained(str(target))
    form = str(exported.export_format)
    if form in ("onnx", "openvino") and getattr(task, "kind", None) in ENCODERS:
        _move_graph(target, form)
    return target


def _move_graph(folder: Path, form: str) -> None:
    """Move the graph and its weights into the folder `form`, and say so in the manifest."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    (folder / form).mkdir(exist_ok=True)
    for component in manifest["components"].values():
        for name in exporter_class(form).program_files(component["file"]):
            if (folder / name).is_file():
                (folder / name).replace(folder / form / name)
        component["file"] = f"{form}/{component['file']}"
    write_json(folder / MANIFEST, manifest)


def open_exported(folder: str | Path) -> Any:
    """The `ExportedModel` in a folder, ready to run on the CPU with as many threads as torch uses.

    Raises:
        LeanError: the folder holds no exported model, or one whose runtime is not installed.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise LeanError(f"{folder} holds no exported model (no {MANIFEST}): give the folder that export wrote.")
    form = json.loads(path.read_text(encoding="utf-8"))["export_format"]
    sentence = missing(f"the export in {folder}", form)
    if sentence is not None:
        raise LeanError(sentence)
    from transformers.exporters import ExportedModel

    with hushed():
        return ExportedModel.from_pretrained(str(folder), device="cpu", local_files_only=True, **options(form))
