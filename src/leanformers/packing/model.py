"""Packed encoders: the stock model on one row that holds the real tokens of a batch and no padding, exactly.

ByteTransformer (Zhai, Jiang, Wang, Jia, Zhang, Chen, Liu, Zhu, IPDPS 2023, arXiv 2210.03052). The real tokens are
found once per forward pass and laid end to end; embeddings, linears and norms then work on tokens [1, tokens,
hidden_size], attention within each sequence (`leanformers.kernels`); the last states are written back into zeros
[batch, length, hidden_size], which the pooler and any head read as ever. Nothing is retrained and no output changes
but by rounding; outputs at padding are zeros.

Deviations: packed and unpacked once per forward instead of once per layer; no family has code of its own, the stock
forward runs; GELU is fused into the linear before it where that was measured to be faster, the other memory-bound steps
by torch.compile; query, key and value are one product in graphs. Cost, lengths l and T = sum of l:
24 T d^2 + 4 d sum l^2 per layer instead of 24 B S d^2 + 4 B S^2 d.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any, TypeVar

import torch

from leanformers.anatomy import Anatomy
from leanformers.compiling import compile_dynamic
from leanformers.errors import LeanError
from leanformers.packing.fusing import fuse
from leanformers.packing.graphs import PaddedGraphs, Row
from leanformers.packing.index import Index
from leanformers.packing.relative import lengths_as_mask, put_packed_attention
from leanformers.packing.sharing import sharing
from leanformers.packing.support import refusal, refusal_here
from leanformers.packing.together import Member, join, look

M = TypeVar("M", bound=torch.nn.Module)

_TOKENS = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")  # what a row is made of
_FLAGS = ("return_dict", "output_hidden_states", "output_attentions", "use_cache")


def pack(model: M, *, compile: bool = False, graphs: bool = False) -> M:
    """The same model, run without padding.

    Args:
        model: an encoder of transformers with any head, edited or not; or a module that holds just one, such as a
            `SentenceTransformer`.
        compile: fuse by torch.compile (dynamic shapes, no graph break); the first calls take up to a minute.
        graphs: replay CUDA graphs, which saves the launches of small batches; on a CPU it changes nothing. Move the
            model to the GPU and make edits before: a graph goes on reading the weights that were there, and those of
            query, key and value are laid end to end then, the same parameters in another place. A mask that stays on
            the CPU spares the GPU a wait for the lengths.

    Returns:
        A model of the same class that shares every weight with the one given, which answers as it did.

    Raises:
        LeanError: a model that cannot be packed; the sentence says why.
    """
    from transformers import PreTrainedModel

    from leanformers.parts.attention import switch_on
    from leanformers.parts.packed_attention import register_packed

    inner = _only_model(model, PreTrainedModel)
    if is_packed(inner):
        raise LeanError(f"{type(inner).__name__} is packed already.")
    weight = next(inner.parameters())
    refused = refusal(inner) or refusal_here(Anatomy.of(inner), weight.device, weight.dtype)
    if refused is not None:
        raise LeanError(refused)
    packed = sharing(model)
    copied = _only_model(packed, PreTrainedModel)
    anatomy = Anatomy.of(copied)
    base: Any = anatomy.base
    if anatomy.family.shared_position_bias:
        put_packed_attention(anatomy)
    else:
        switch_on(copied, register_packed())
    fuse(anatomy, replayed=graphs)
    if graphs and weight.is_cuda:
        join(anatomy)
    base.packer = Packer(anatomy, compile=compile, graphs=graphs)
    base.forward = MethodType(_like(type(base).forward), base)
    return packed


def is_packed(model: torch.nn.Module) -> bool:
    """Whether a model, or one within it, runs packed."""
    return any(hasattr(module, "packer") for module in model.modules())


def _only_model(model: torch.nn.Module, kind: type) -> Any:
    """The one model of transformers in a module: the outermost."""
    if isinstance(model, kind):
        return model
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    found = [module for module in modules if isinstance(module, kind)]
    inside = {id(part) for whole in found for part in whole.modules() if part is not whole}
    outer = [module for module in found if id(module) not in inside]
    if len(outer) != 1:
        raise LeanError(
            f"{type(model).__name__} holds {len(outer)} models of transformers: give one, or a module with one."
        )
    return outer[0]


def _some(model: torch.nn.Module) -> list[torch.Tensor]:
    """Weights that tell whether a model was moved: the first, the last, and those that lay with others."""
    weights: list[torch.Tensor] = [module.weight for module in model.modules() if isinstance(module, Member)]
    return [next(model.parameters()), *weights, list(model.parameters())[-1]]


def _like(stock: Any) -> Any:
    """The packed forward under the stock one's signature, by which pipelines choose what they pass."""

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.packer(self, args, kwargs)

    return forward


class Packer:
    """Runs a base model packed; hangs on it as `packer`."""

    def __init__(self, anatomy: Anatomy, *, compile: bool, graphs: bool) -> None:
        self.compile, self.graphs = compile, graphs
        self.family = anatomy.family
        self._anatomy = anatomy
        self._stock = type(anatomy.base).forward
        self._names = list(inspect.signature(self._stock).parameters)[1:]
        self._checked: tuple[Any, ...] | None = None
        self._weights: list[torch.Tensor] = []
        self._compiled: Any = None
        self._graphs: PaddedGraphs | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Packer:
        """What is compiled belongs to one model."""
        anatomy = copy.copy(self._anatomy)
        object.__setattr__(anatomy, "base", copy.deepcopy(self._anatomy.base, memo))
        return Packer(anatomy, compile=self.compile, graphs=self.graphs)

    def __call__(self, base: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        flags = {name: given.pop(name) for name in _FLAGS if name in given}
        padded = {name: given.pop(name) for name in _TOKENS if given.get(name) is not None}
        mask = given.pop("attention_mask", None)
        self._check(base, padded, mask, given, flags)
        first = padded.get("input_ids", padded.get("inputs_embeds"))
        assert first is not None
        if mask is None:
            mask = torch.ones(first.shape[:2], dtype=torch.bool)
        if self.family.shared_position_bias and Index.holes(mask):
            raise LeanError("The mask has zeros between ones, and relative positions would change without them.")
        wanted = flags.get("output_hidden_states")
        wanted = wanted if wanted is not None else getattr(base.config, "output_hidden_states", False)
        replayed = self._replayed(base, padded, mask) if self.graphs and first.is_cuda and not wanted else None
        if replayed is not None:
            index, output = replayed
            output = type(output)(**output)  # a graph's own output is there for every call
        else:
            index = Index.of(mask.to(first.device), Index.lengths(mask))
            row = self._row(base, padded, index)
            if wanted:
                output = self._run_stock(base, row, index.cu_seqlens, index.max_length, output_hidden_states=True)
                output["hidden_states"] = tuple(index.unpack(states) for states in output["hidden_states"])
            else:
                output = self._run(base, row, index)
        states = index.unpack(output["last_hidden_state"], mask.shape[1])
        output["last_hidden_state"] = states
        if getattr(base, "pooler", None) is not None:
            output["pooler_output"] = base.pooler(states)
        as_dict = flags.get("return_dict")
        if as_dict is None:
            as_dict = getattr(base.config, "return_dict", True)
        return output if as_dict else output.to_tuple()

    def _replayed(self, base: Any, padded: Row, mask: torch.Tensor) -> tuple[Index, Any] | None:
        if self._graphs is None:
            self._graphs = PaddedGraphs(
                lambda held, index: self._row(base, held, index), lambda row, index: self._run(base, row, index)
            )
        return self._graphs(padded, mask)

    def _check(self, base: Any, padded: Row, mask: Any, rest: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
        """Refuse what the packed row cannot answer."""
        if base.training:
            raise LeanError("A packed model is for inference: call model.eval(), or train the model it was made of.")
        left = next((name for name, value in rest.items() if isinstance(value, torch.Tensor)), None)
        left = left or ("past_key_values" if rest.get("past_key_values") is not None else None)
        if left is not None:
            raise LeanError(f"A packed model takes no {left}: call the model it was made of.")
        if flags.get("output_attentions") or getattr(base.config, "output_attentions", False):
            raise LeanError("A packed model never holds attention weights: leave output_attentions out.")
        if mask is not None and mask.dim() != 2:
            raise LeanError(f"A packed model takes a mask [batch, length], not one of {mask.dim()} axes.")
        if ("input_ids" in padded) == ("inputs_embeds" in padded):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        weight = next(base.parameters())
        if not self._weights:
            self._weights = _some(base) if self.graphs else [weight]
        here = (weight.device, weight.dtype, *(one.data_ptr() for one in self._weights))
        if here != self._checked:
            if (refused := refusal_here(self._anatomy, weight.device, weight.dtype)) is not None:
                raise LeanError(refused)
            self._checked, self._graphs = here, None  # a graph reads the weights where they were
            look(base)

    def _row(self, base: Any, padded: Row, index: Index) -> Row:
        """The packed row's inputs, positions and token types always among them where the model has any."""
        ids = padded.get("input_ids", padded.get("inputs_embeds"))
        assert ids is not None
        row = {name: index.pack(part) for name, part in padded.items() if name in ("input_ids", "inputs_embeds")}
        row["position_ids"] = self._positions(base, ids, padded.get("position_ids"), index)
        if "token_type_ids" in self._names:
            types = padded.get("token_type_ids")
            row["token_type_ids"] = torch.zeros_like(row["position_ids"]) if types is None else index.pack(types)
        if not index.tokens:  # poolers read a first token: one that belongs to no sequence
            return {name: part.new_zeros(1, 1, *part.shape[2:]) for name, part in row.items()}
        return row

    def _positions(self, base: Any, ids: torch.Tensor, given: torch.Tensor | None, index: Index) -> torch.Tensor:
        """The packed tokens' positions in the padded batch, [1, tokens], as the stock model counts them."""
        if given is not None:
            return index.pack(given.expand(index.batch, index.length))
        if not self.family.positions_follow_padding:
            return (index.places % index.length)[None]
        padding = base.embeddings.padding_idx
        if ids.dim() == 3:  # embeddings: padding cannot be told from tokens
            return (index.places % index.length)[None] + padding + 1
        real = ids.ne(padding).int()
        return index.pack((real.cumsum(1) * real).long() + padding)

    def _run(self, base: Any, row: Row, index: Index) -> Any:
        """The base model's output on the row, [1, at least tokens, hidden_size] at `last_hidden_state`."""
        if self.compile and self._compiled is None:
            self._compiled = compile_dynamic(functools.partial(self._run_stock, base), fullgraph=True)
        run = self._compiled or functools.partial(self._run_stock, base)
        return run(row, index.cu_seqlens, index.max_length)

    def _run_stock(self, base: Any, row: Row, cu_seqlens: torch.Tensor, max_length: int, **flags: Any) -> Any:
        lengths: dict[str, Any] = {"cu_seq_lens_q": cu_seqlens, "max_length_q": max_length, "attention_mask": None}
        if self.family.shared_position_bias:
            lengths = {"attention_mask": lengths_as_mask(cu_seqlens, max_length)}
        return self._stock(base, **row, return_dict=True, **lengths, **flags)
