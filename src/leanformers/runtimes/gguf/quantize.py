"""Quantising a GGUF file, by llama.cpp itself."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

from leanformers.errors import LeanError
from leanformers.folders import guarding_disk, partial_of
from leanformers.runtimes.llama_session import last_error, library

logger = logging.getLogger(__name__)


class Kind(NamedTuple):
    """llama.cpp's number of the file type, and how many weights of a row share their scales."""

    number: int
    multiple: int


KINDS = {"q8_0": Kind(7, 32), "q4_k_m": Kind(15, 256), "q5_k_m": Kind(17, 256), "q6_k": Kind(18, 256)}
_BLOCK = 32  # the smallest that llama.cpp falls back to


def row_multiple(kind: str) -> int:
    """What the widths of a model should be multiples of to be stored as this kind throughout.

    1 for f32, f16 and bf16, 32 for q8_0, 256 for the K-quants. K-quants take multiples of 32 too, in a larger
    format; other widths cannot be quantised. Widths are the inputs of a linear: hidden size, intermediate
    size, heads times head size.

    Raises:
        LeanError: an unknown kind.
    """
    return 1 if kind in ("f32", "f16", "bf16") else _known(kind).multiple


def fallback_note(path: str | Path, kind: str) -> str | None:
    """One sentence if the widths of a GGUF file make llama.cpp store part of it in a larger format than `kind`.

    Raises:
        LeanError: an unknown kind, or a width that is no multiple of 32, which cannot be quantised at all.
    """
    multiple = _known(kind).multiple
    matrices = _matrices(path)
    for name, width, _ in matrices:
        if width % _BLOCK:
            raise LeanError(
                f"{_place(name)} has {width} inputs, no multiple of {_BLOCK}, so it cannot be stored as {kind}: round "
                f"its width to a multiple of {multiple}, or leave the file in f16."
            )
    odd = [(name, width, size) for name, width, size in matrices if width % multiple]
    if not odd:
        return None
    share = sum(size for *_, size in odd) / sum(size for *_, size in matrices)
    return (
        f"{len(odd)} of {len(matrices)} matrices ({share:.0%} of the weights) have widths that are no multiple of "
        f"{multiple} (first: {odd[0][0]}, {odd[0][1]}): {kind} stores them in a larger format of {_BLOCK} to a block."
    )


def quantize_gguf(source: str | Path, target: str | Path, kind: str, threads: int | None = None) -> Path:
    """Quantise a GGUF file written in f32, f16 or bf16. A file at `target` is replaced.

    Args:
        kind: `q8_0`, `q4_k_m`, `q5_k_m` or `q6_k`.
        threads: None takes torch's number.

    Raises:
        LeanError: llama-cpp-python is not installed, an unknown kind, a width that cannot be quantised, or a
            file that llama.cpp cannot read.
    """
    number, target = _known(kind).number, Path(target)
    cpp = library()
    note = fallback_note(source, kind)
    if note:
        logger.info("%s: %s", Path(source).name, note)
    parameters = cpp.llama_model_quantize_default_params()
    parameters.ftype = number
    parameters.nthread = threads or torch.get_num_threads()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(target)
    with guarding_disk(target):
        try:
            failed = cpp.llama_model_quantize(bytes(Path(source)), bytes(partial), ctypes.byref(parameters))
            if failed:
                raise LeanError(
                    f"llama.cpp could not quantise {source} to {kind} ({last_error()}): write it again with write_gguf."
                )
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def _known(kind: str) -> Kind:
    if kind not in KINDS:
        raise LeanError(f"There is no quantisation {kind!r} for GGUF files: choose one of {', '.join(KINDS)}.")
    return KINDS[kind]


def _matrices(path: str | Path) -> list[tuple[str, int, int]]:
    """Name, inputs per row and number of weights of every matrix in the file."""
    from gguf import GGUFReader

    try:
        tensors: list[Any] = GGUFReader(path).tensors
    except (OSError, ValueError) as error:
        raise LeanError(f"{path} is no GGUF file that can be read ({error}).") from error
    if any(tensor.tensor_type.name not in ("F32", "F16", "BF16") for tensor in tensors):
        raise LeanError(f"{path} is quantised already: quantise the file that was written in f16, bf16 or f32.")
    return [(t.name, int(t.shape[0]), int(t.n_elements)) for t in tensors if len(t.shape) == 2]


def _place(name: str) -> str:
    parts = name.split(".")
    return f"layer {parts[1]} ({name})" if parts[0] == "blk" else name
