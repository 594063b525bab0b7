"""Prefill without padding: the prompts of a batch end to end in packed rows, and an ordinary cache of them.

Prepacking (Zhao, Israel, Van den Broeck, Grover, 2024, arXiv 2404.09529). Each prompt but for its last token is laid
into a row; positions restart with each, and attention stays within it. Keys and values go straight into a left-padded
cache in the order in which the prompts came, and the last tokens are fed in the first step of decoding, all together:
so `generate` goes on as ever. Nothing is retrained, and the tokens are those of the padded batch.

Two paths. *varlen*: rows of up to `MOST_TOKENS` tokens, attention by `leanformers.kernels` on lengths alone; bins only
bound the memory. *dense*: rows as long as the longest prompt, and a block-diagonal mask [rows, 1, size, size] that SDPA
reads, for a device that has no variable-length kernel. Deviations: the packed cache is never held, each layer is
unpacked as it is computed. Cost, lengths l and their sum T: 24 T d^2 + 2 d sum l^2 per layer instead of padding's
24 k M d^2 + 4 k M^2 d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from leanformers.anatomy import Anatomy
from leanformers.compiling import compile_dynamic
from leanformers.errors import LeanError
from leanformers.packing.bins import first_fit_decreasing
from leanformers.packing.graphs import MOST_TOKENS as MOST_IN_GRAPHS
from leanformers.packing.graphs import Graphs, Row
from leanformers.packing.prompts import Prompts, Rows
from leanformers.packing.support import positions_by_the_longest, refusal_here, refusal_of_length, refusal_to_prefill

PATHS = ("varlen", "dense")
MOST_TOKENS = 16384  # of a row on a GPU, which bounds the memory of its activations
MOST_TOKENS_CPU = 2048  # activations that a cache holds: on two cores faster than 512 and than 16,384
FULL = 0.95  # share of the padded batch's positions beyond which packing has nothing to gain


@dataclass(frozen=True, eq=False, kw_only=True)
class Prefilled(Mapping[str, Any]):
    """What `generate` goes on from: `model.generate(**prefilled, max_new_tokens=20)`.

    input_ids, attention_mask: int64 [prompts, longest], padded on the left. past_key_values: a DynamicCache of all
    but the last token of each. path: varlen or dense. share: positions computed over those of the padded batch.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    past_key_values: Any
    path: str
    share: float

    @property
    def last_tokens(self) -> torch.Tensor:
        """int64 [prompts, 1], what the cache does not hold yet."""
        return self.input_ids[:, -1:]

    def __getitem__(self, name: str) -> Any:
        if name not in _HANDED_ON:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(_HANDED_ON)

    def __len__(self) -> int:
        return len(_HANDED_ON)


_HANDED_ON = ("input_ids", "attention_mask", "past_key_values")


def prefill(
    model: Any, input_ids: Any, attention_mask: torch.Tensor | None = None, *, path: str | None = None
) -> Prefilled:
    """Compute the cache of a batch of prompts without padding.

    While it runs the model's attention function is another one, so no other thread may call the model.

    Args:
        model: a decoder of transformers, edited or not.
        input_ids: int64 [prompts, length], padded on either side, or one list of token ids per prompt.
        attention_mask: [prompts, length], 0 at padding.
        path: one of `PATHS`; by default varlen where there is a kernel for it.

    Returns:
        What `generate(**prefilled)` goes on from: the cache, the left-padded ids and their mask.

    Raises:
        LeanError: a model or prompts that cannot be packed; the sentence says why.
    """
    return Prefiller(model)(input_ids, attention_mask, path=path)


class Prefiller:
    """Prefills batches of one model. compile, graphs: as in `prepack`."""

    def __init__(self, model: Any, *, compile: bool = False, graphs: bool = False) -> None:
        if (refused := refusal_to_prefill(model)) is not None:
            raise LeanError(refused)
        self.anatomy = Anatomy.of(model)
        found = [model.config, *(getattr(module, "config", None) for module in self.anatomy.base.modules())]
        self._configs = list({id(config): config for config in found if config is not None}.values())
        self.compile = compile
        self.graphs = graphs and not positions_by_the_longest(self.anatomy.config)  # looking waits for the GPU
        self._replay: Graphs | None = None
        self._compiled: Callable[..., Any] | None = None
        self._weight: Any = None

    def path(self) -> str:
        """The path on this model's device."""
        weight = self._floats()
        no_kernel = refusal_here(self.anatomy, weight.device, weight.dtype)
        return "varlen" if no_kernel is None else "dense"

    def read(self, input_ids: Any, attention_mask: torch.Tensor | None = None) -> Prompts:
        """The prompts, on the model's device.

        Raises:
            LeanError: prompts that this model cannot be given packed.
        """
        if self.anatomy.model.training:
            raise LeanError(
                f"{type(self.anatomy.model).__name__} is training, and dropout has no packed rows: call model.eval()."
            )
        prompts = Prompts.of(input_ids, attention_mask, self._floats().device)
        if (refused := refusal_of_length(self.anatomy, prompts.longest)) is not None:
            raise LeanError(refused)
        return prompts

    def bins(self, prompts: Prompts, path: str) -> list[list[int]]:
        """Which prompts share a row."""
        most = prompts.longest - 1
        if path == "varlen":
            most = max(most, MOST_TOKENS if prompts.tokens.is_cuda else MOST_TOKENS_CPU)
        return first_fit_decreasing(prompts.cached, most)

    def share(self, prompts: Prompts, path: str) -> float:
        """Positions that a packed pass computes over those of the padded batch."""
        computed = sum(prompts.cached)
        if path == "dense":
            bins = self.bins(prompts, path)
            computed = len(bins) * max((sum(prompts.cached[i] for i in held) for held in bins), default=0)
        return computed / (len(prompts) * prompts.longest)

    def __call__(
        self, input_ids: Any, attention_mask: torch.Tensor | None = None, *, path: str | None = None
    ) -> Prefilled:
        path = self.path() if path is None else path
        if path not in PATHS:
            raise LeanError(f"There is no path {path!r} to prefill by: choose one of {', '.join(PATHS)}.")
        prompts = self.read(input_ids, attention_mask)
        cache = self.cache(prompts, path)
        config = self.anatomy.config
        known = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
        padding = next((token for token in known if isinstance(token, int) and token >= 0), 0)
        ids, mask = prompts.left_padded(padding)
        return Prefilled(
            input_ids=ids, attention_mask=mask, past_key_values=cache, path=path, share=self.share(prompts, path)
        )

    @torch.no_grad()
    def cache(self, prompts: Prompts, path: str, width: int | None = None) -> Any:
        """A DynamicCache of all but each prompt's last token [prompts, key heads, width, head_dim].

        width: by default as the longest prompt needs it.
        """
        from leanformers.packing.unpacking import Unpacker

        width = prompts.longest - 1 if width is None else width
        unpacker = Unpacker(len(prompts), width)
        bins = self.bins(prompts, path)
        for group in [[held] for held in bins] if path == "varlen" else _together(bins, prompts):
            rows = prompts.rows(group, width)
            unpacker.rows = rows
            with _attention(self._configs, path):
                if path == "dense":
                    self._forward(rows_of(rows), unpacker, attention_mask=rows.mask())
                else:
                    self._varlen(rows, unpacker)
        return unpacker.finish(self.anatomy.config)

    def _varlen(self, rows: Rows, unpacker: Any) -> None:
        edges, longest, given = rows.cu_seqlens(), max(rows.lengths), rows_of(rows)
        replayed = self.graphs and edges.is_cuda and given["input_ids"].shape[1] <= MOST_IN_GRAPHS
        if not self.compile and not replayed:
            self._forward(given, unpacker, attention_mask=None, cu_seq_lens_q=edges, max_length_q=longest)
            return
        if self._moved() or self._compiled is None:
            run = self._collect
            self._compiled = compile_dynamic(run, fullgraph=True) if self.compile else run
            self._replay = Graphs(self._compiled)
        kept = (self._replay if replayed and self._replay else self._compiled)(given, edges, longest)
        for layer_idx, keys, values in kept:
            unpacker.update(keys, values, layer_idx)

    def _collect(self, given: Row, edges: torch.Tensor, longest: int) -> Any:
        """Every layer's keys and values of a packed row."""
        from leanformers.packing.unpacking import Collector

        collector = Collector()
        self._forward(given, collector, attention_mask=None, cu_seq_lens_q=edges, max_length_q=longest)
        return collector.kept

    def _forward(self, given: Row, cache: Any, **kwargs: Any) -> None:
        """The base model on packed rows: no logits are asked for."""
        self.anatomy.base(**given, past_key_values=cache, use_cache=True, return_dict=True, **kwargs)

    def _floats(self) -> Any:
        return next(weight for weight in self.anatomy.base.parameters() if weight.is_floating_point())

    def _moved(self) -> bool:
        """Whether the weights are not where they were: a graph goes on reading them there."""
        weight = self._floats()
        here = (weight.device, weight.dtype, weight.data_ptr())
        moved, self._weight = here != self._weight, here
        return moved


def rows_of(rows: Rows) -> Row:
    return {"input_ids": rows.ids, "position_ids": rows.positions}


def _together(bins: list[list[int]], prompts: Prompts) -> Iterator[list[list[int]]]:
    """Rows of the dense path, as many at once as hold about `MOST_TOKENS`."""
    most = MOST_TOKENS if prompts.tokens.is_cuda else MOST_TOKENS_CPU
    step = max(1, most // max(1, prompts.longest - 1))
    for low in range(0, len(bins), step):
        yield bins[low : low + step]


@contextmanager
def _attention(configs: list[Any], path: str) -> Iterator[None]:
    """A model with another attention function; its own is put back."""
    from leanformers.parts.packed_attention import register_prefill

    name = register_prefill() if path == "varlen" else "sdpa"
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own
