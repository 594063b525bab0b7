"""Decoders as GGUF files, the format of llama.cpp.

    write_gguf(model, tokenizer, "model.gguf")                  # f16, f32 or bf16
    quantize_gguf("model.gguf", "model-q8_0.gguf", "q8_0")      # by llama.cpp itself

A model whose layers are alike is written under its family's own architecture. Layers of different width, or
without attention or feed-forward, go under `deci`, which takes LLaMA's graph with sizes per layer. What has
no graph in llama.cpp that was proved equal is refused.
"""

from leanformers.runtimes.gguf.graph import Graph
from leanformers.runtimes.gguf.quantize import KINDS, fallback_note, quantize_gguf, row_multiple
from leanformers.runtimes.gguf.write import DTYPES, write_gguf

__all__ = ["DTYPES", "KINDS", "Graph", "fallback_note", "quantize_gguf", "row_multiple", "write_gguf"]
