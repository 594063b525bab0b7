"""llama.cpp through its bindings: an open GGUF file, its logits, greedy tokens, and how fast they come."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import time
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from leanformers.errors import LeanError

AMX = (
    "llama.cpp's kernels for AMX can end the process (built by GCC before 12.4 they do): "
    "CFLAGS=-mno-amx-int8 CXXFLAGS=-mno-amx-int8 pip install --force-reinstall --no-cache-dir llama-cpp-python "
    "leaves them out."
)
STEP = 512  # tokens that llama.cpp multiplies at once, and the smallest context
logger = logging.getLogger(__name__)
_ERROR = 4  # llama.cpp's level
_errors: list[str] = []
_listeners: list[Any] = []  # llama.cpp calls them for as long as the process lives


def missing_packages() -> str | None:
    """One sentence if gguf or llama-cpp-python is not installed, else None."""
    if all(importlib.util.find_spec(name) for name in ("gguf", "llama_cpp")):
        return None
    return "the runtime 'llama.cpp' needs the packages gguf and llama-cpp-python: pip install 'leanformers[llamacpp]'"


@cache
def library() -> Any:
    """The module `llama_cpp`; what it reports goes to Python's logging, at debug level.

    Raises:
        LeanError: it is not installed.
    """
    refusal = missing_packages()
    if refusal:
        raise LeanError(refusal)
    import llama_cpp

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, data: Any) -> None:
        line = text.decode(errors="replace").strip()
        logger.debug("%s", line)
        if level == _ERROR and line:
            _errors[:] = [line]

    llama_cpp.llama_log_set(listen, None)
    _listeners.append(listen)
    llama_cpp.llama_backend_init()
    return llama_cpp


def last_error() -> str:
    """What llama.cpp last complained of."""
    return _errors[0].rstrip(".") if _errors else "it does not say why"


@cache
def has_amx() -> bool:
    """Whether llama.cpp has its kernels for AMX here. They may end the process, so they are not used.

    GCC before 12.4 compiles their tile configuration away; others have seen them fail for want of a permission.
    """
    found = b"AMX_INT8 = 1" in library().llama_print_system_info()
    if found:
        logger.warning("%s Here it runs without these kernels, and so without its other repacked ones.", AMX)
    return found


class Written(NamedTuple):
    """Tokens written after a prompt, and the seconds that the prompt with the first token and the others took."""

    tokens: list[int]
    prefill: float
    decode: float


class Session:
    """An open GGUF file, on the CPU and on as many threads as torch has.

    Args:
        exact: keep keys and values in f32, so that nothing is rounded but the weights: to compare with. Else they
            are in f16, as where people serve these files.

    Raises:
        LeanError: llama.cpp cannot open the file.
    """

    def __init__(self, path: str | Path, *, exact: bool = False) -> None:
        self._cpp = cpp = library()
        parameters = cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.use_extra_bufts = not has_amx()
        self._model = cpp.llama_model_load_from_file(bytes(Path(path)), parameters)
        if not self._model:
            raise LeanError(f"llama.cpp cannot open {path} ({last_error()}): write the file again with write_gguf.")
        self._vocabulary = cpp.llama_model_get_vocab(self._model)
        self.vocab_size: int = cpp.llama_vocab_n_tokens(self._vocabulary)
        self._free_model = weakref.finalize(self, cpp.llama_model_free, self._model)
        self._exact = exact
        self._length = 0  # tokens that the context has room for
        self._context: Any = None
        self._free_context: Any = None

    def close(self) -> None:
        """Free the memory now; a session that is dropped does so by itself."""
        if self._free_context is not None:
            self._free_context()
        self._free_model()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text by the file's own tokenizer, special tokens in it recognised."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = self._cpp.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), True, True)
        return list(ids[:count])

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits [length, vocab_size], float32, after every one of the tokens."""
        self._start(max(len(ids), 1))
        return self._decode(ids, 0, every=True)

    def batch_logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits [batch, length, vocab_size] of padded rows [batch, length], one after another; 0 at the padding."""
        outputs = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, ids, real in zip(outputs, input_ids, attention_mask.bool(), strict=True):
            if real.any():
                row[real] = self.logits(ids[real].tolist())
        return outputs

    def write(self, prompt: Sequence[int], new_tokens: int) -> Written:
        """Write `new_tokens` tokens greedily, past any end-of-text token, and time it."""
        self._start(len(prompt) + new_tokens)
        begin = time.perf_counter()
        tokens = [int(self._decode(prompt, 0).argmax())]
        middle = time.perf_counter()
        for position in range(len(prompt), len(prompt) + new_tokens - 1):
            tokens.append(int(self._decode(tokens[-1:], position).argmax()))
        return Written(tokens, middle - begin, time.perf_counter() - middle)

    def _start(self, length: int) -> None:
        """An empty context with room for so many tokens."""
        cpp, threads = self._cpp, torch.get_num_threads()
        if length > self._length:
            self._open_context(max(STEP, 1 << (length - 1).bit_length()))
        cpp.llama_set_n_threads(self._context, threads, threads)
        cpp.llama_memory_clear(cpp.llama_get_memory(self._context), True)

    def _open_context(self, length: int) -> None:
        cpp, self._length = self._cpp, 0
        if self._free_context is not None:
            self._free_context()
        parameters = cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = length
        parameters.n_ubatch = STEP
        if self._exact:
            parameters.type_k = parameters.type_v = cpp.GGML_TYPE_F32
            parameters.flash_attn_type = cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to f16 by itself
        self._context = cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise LeanError(f"llama.cpp has no room for {length} tokens ({last_error()}): shorten the texts.")
        self._batch = cpp.llama_batch_init(length, 0, 1)
        self._free_context = weakref.finalize(self, _free, cpp, self._context, self._batch)
        for index in range(length):  # every token is of one sequence, number 0
            self._batch.n_seq_id[index] = 1
            self._batch.seq_id[index][0] = 0
        self._length = length

    def _decode(self, ids: Sequence[int], position: int, every: bool = False) -> torch.Tensor:
        """Logits after all tokens [length, vocab_size], or after the last alone [1, vocab_size]."""
        batch, count = self._batch, len(ids)
        if not count:
            raise LeanError("llama.cpp cannot run a text without tokens: give at least one.")
        batch.n_tokens = count
        np.ctypeslib.as_array(batch.token, (count,))[:] = ids
        np.ctypeslib.as_array(batch.pos, (count,))[:] = range(position, position + count)
        np.ctypeslib.as_array(batch.logits, (count,))[:] = every
        batch.logits[count - 1] = 1
        if self._cpp.llama_decode(self._context, batch) != 0:
            raise LeanError(
                f"llama.cpp could not run {count} tokens ({last_error()}): give ids below {self.vocab_size}."
            )
        shape = (count if every else 1, self.vocab_size)
        return torch.from_numpy(np.ctypeslib.as_array(self._cpp.llama_get_logits(self._context), shape).copy())


def _free(cpp: Any, context: Any, batch: Any) -> None:
    cpp.llama_batch_free(batch)
    cpp.llama_free(context)


def rates(path: str | Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, float]:
    """Tokens per second of a GGUF file, one prompt at a time: `prefill` reads a prompt, `decode` writes after it.

    Args:
        prompts: token ids. The first is run once before, untimed.
        new_tokens: written after each prompt, at least 2; the first of them belongs to the prefill.

    Raises:
        LeanError: no prompts, an empty one, or fewer than two new tokens.
    """
    if not prompts or not all(prompts) or new_tokens < 2:
        raise LeanError("Rates need prompts of at least one token and at least 2 new tokens: give more of them.")
    session = Session(path)
    session.write(prompts[0], new_tokens)
    written = [session.write(prompt, new_tokens) for prompt in prompts]
    session.close()
    return {
        "prefill": sum(map(len, prompts)) / sum(one.prefill for one in written),
        "decode": len(prompts) * (new_tokens - 1) / sum(one.decode for one in written),
    }
