"""Writing a GGUF file: the sizes, the tokenizer, then one tensor after another."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leanformers.errors import LeanError
from leanformers.folders import guarding_disk, partial_of
from leanformers.runtimes.gguf.graph import Graph
from leanformers.runtimes.gguf.tensors import Entry, entries
from leanformers.runtimes.gguf.vocabulary import write_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def write_gguf(model: Any, tokenizer: PreTrainedTokenizerBase | None, path: str | Path, dtype: str = "f16") -> Path:
    """Write a causal language model, edits and all, as one GGUF file. A file of that name is replaced.

    Args:
        model: with its language-model head; `Graph.of` says which.
        tokenizer: None writes a file that takes token ids alone.
        dtype: of the matrices, `f16`, `f32` or `bf16`; norms and biases are always f32.

    Raises:
        LeanError: a model or tokenizer that llama.cpp has no equal for, a weight outside the dtype's range, a
            full disk, or the package gguf is not installed.
    """
    if dtype not in DTYPES:
        raise LeanError(f"There is no dtype {dtype!r} for a GGUF file: choose one of {', '.join(DTYPES)}.")
    if importlib.util.find_spec("gguf") is None:
        raise LeanError("Writing GGUF files needs the package gguf: pip install 'leanformers[llamacpp]'.")
    from gguf import GGUFWriter

    graph, path = Graph.of(model), Path(path)
    tensors = list(entries(graph))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    writer = GGUFWriter(None, graph.architecture)
    with guarding_disk(path):
        try:
            _describe(writer, graph, dtype)
            write_vocabulary(writer, tokenizer, graph.vocab_size)
            _write(writer, tensors, partial, dtype)
            writer.close()
            partial.replace(path)
        finally:
            writer.close()
            partial.unlink(missing_ok=True)
    return path


def _describe(writer: Any, graph: Graph, dtype: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    anatomy, config = graph.anatomy, graph.anatomy.config
    kinds = {
        "f32": LlamaFileType.ALL_F32,
        "f16": LlamaFileType.MOSTLY_F16,
        "bf16": LlamaFileType.MOSTLY_BF16,
    }
    writer.add_type("model")
    writer.add_name(Path(str(getattr(config, "_name_or_path", ""))).name or type(anatomy.model).__name__)
    writer.add_file_type(kinds[dtype])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(graph.vocab_size)
    writer.add_context_length(graph.context_length)
    writer.add_embedding_length(anatomy.hidden_size)
    writer.add_block_count(len(anatomy.layers))
    per_layer = list if graph.uneven else (lambda sizes: sizes[0])
    writer.add_feed_forward_length(per_layer(graph.widths))
    writer.add_head_count(per_layer(graph.heads))
    writer.add_head_count_kv(per_layer(graph.key_value_heads))
    writer.add_key_length(graph.head_dim)
    writer.add_value_length(graph.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(graph.head_dim)
    writer.add_rope_freq_base(graph.rope_theta)
    if graph.architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base_swa(float(config.rope_parameters["sliding_attention"]["rope_theta"]))
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        if slides != [(index + 1) % 6 != 0 for index in range(len(slides))]:  # of itself every sixth does not
            writer.add_sliding_window_pattern(slides)


def _write(writer: Any, tensors: list[Entry], path: Path, dtype: str) -> None:
    """All sizes first, for the header, then the tensors one by one."""
    from gguf import GGMLQuantizationType

    for entry in tensors:
        kind = _kind(entry, dtype)
        size = DTYPES[kind].itemsize * torch.Size(entry.shape).numel()
        writer.add_tensor_info(entry.name, entry.shape, None, size, raw_dtype=GGMLQuantizationType[kind.upper()])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in tensors:
        kind = _kind(entry, dtype)
        data = entry.make().to(DTYPES[kind]).contiguous()
        if not data.isfinite().all():
            raise LeanError(
                f"{entry.name} holds a number that is not finite in {kind}: "
                f"{'write the file in bf16 or f32.' if kind == 'f16' else 'the model is broken.'}"
            )
        # numpy has no bfloat16; the writer takes the bytes as they are.
        writer.write_tensor_data((data.view(torch.int16) if kind == "bf16" else data).numpy())


def _kind(entry: Entry, dtype: str) -> str:
    return dtype if len(entry.shape) == 2 else "f32"
