"""Keep vocabulary: cut embeddings, head and every vocabulary-wide vector down to some tokens.

The tokenizer is cut beside it (``surgery.tokenizers``). The result is a stock checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from leanformers.anatomy import Anatomy, linear_shape
from leanformers.errors import LeanError
from leanformers.surgery.config import set_field
from leanformers.surgery.edit import Cost, Edit, edit, kept, on_meta
from leanformers.surgery.linears import row_flops


@edit("keep_vocabulary")
@dataclass(frozen=True, kw_only=True)
class KeepVocabulary(Edit):
    """Keep ``size`` rows of the vocabulary.

    ``apply`` takes ``keep`` (int64, [size], ascending): the old ids; the new id is the place in it. Every token
    id in the config and generation config moves along, and must be among the kept.
    """

    size: int

    def apply(self, anatomy: Anatomy, keep: torch.Tensor | None = None, **tensors: object) -> None:
        model, table = anatomy.model, _table(anatomy)
        total = table.weight.shape[0]
        skeleton = on_meta(table)
        index = kept(keep, self.size, total, "rows of the vocabulary", on_skeleton=skeleton)
        moved = {} if skeleton and keep is None else _moved_ids(anatomy, index)
        for owner, name in list(_vectors(anatomy, total)):
            _narrow(owner, name, index, total)
        _retie(model, table)
        for module in model.modules():
            if (
                isinstance(module, nn.Embedding)
                and module.num_embeddings == total
                and module.weight.shape[0] == self.size
            ):
                module.num_embeddings = self.size
                if module.padding_idx is not None and moved:
                    module.padding_idx = _position(index, module.padding_idx)
        head = anatomy.head
        if isinstance(head, nn.Linear) and head.weight.shape[0] == self.size:
            head.out_features = self.size
        for config in _configs(anatomy):
            set_field(model, config, "vocab_size", self.size)
            for name, value in moved.get(id(config), {}).items():
                set_field(model, config, name, value)
        generation = getattr(model, "generation_config", None)
        for name, value in moved.get(id(generation), {}).items():
            setattr(generation, name, value)
        holders: list[Any] = [m for m in model.modules() if getattr(m, "vocab_size", None) == total]
        for holder in holders:
            holder.vocab_size = self.size

    def cost(self, anatomy: Anatomy) -> Cost:
        table = _table(anatomy)
        total = table.weight.shape[0]
        gone = total - self.size
        seen: set[int] = set()
        parameters = 0
        for owner, name in _vectors(anatomy, total):
            tensor = getattr(owner, name)
            if isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
                seen.add(id(tensor))
                parameters += tensor.numel() // total
        head = anatomy.head
        return Cost(parameters=-gone * parameters, per_token=0 if head is None else -gone * row_flops(head))


def _table(anatomy: Anatomy) -> Any:
    table = anatomy.embeddings
    if table is None:
        raise LeanError(f"{type(anatomy.model).__name__} reads no tokens, so it has no vocabulary to cut.")
    if not isinstance(table, nn.Embedding):
        raise LeanError(f"The embeddings are a {type(table).__name__}: cut the vocabulary before other edits on it.")
    return table


def _vectors(anatomy: Anatomy, total: int) -> Iterator[tuple[Any, str]]:
    """Owner and name of every tensor that has one entry per token: tables, head and their biases."""
    model, table = anatomy.model, anatomy.embeddings
    head: Any = anatomy.head
    for path, module in model.named_modules():
        owns_head = head is not None and any(child is head for child in module.children())
        if isinstance(module, nn.Embedding) and (module is table or path.endswith("embed_tokens")):
            if module.weight.shape[0] == total:
                yield module, "weight"
        elif module is head:
            if linear_shape(module)[0] == total:
                yield module, "weight"
                if module.bias is not None:
                    yield module, "bias"
        elif owns_head and module is not model and _width(getattr(module, "bias", None)) == total:
            yield module, "bias"  # BERT's predictions share it with the head
    bias = getattr(model, "final_logits_bias", None)
    if isinstance(bias, torch.Tensor) and bias.shape[-1] == total:
        yield model, "final_logits_bias"


def _width(tensor: Any) -> int | None:
    return tensor.shape[-1] if isinstance(tensor, torch.Tensor) else None


def _narrow(owner: nn.Module, name: str, index: torch.Tensor, total: int) -> None:
    tensor = getattr(owner, name)
    if tensor.shape[0] != total and tensor.shape[-1] != total:
        return  # one tensor under two names: already cut
    axis = 0 if tensor.shape[0] == total else tensor.ndim - 1
    data = tensor.data.index_select(axis, index.to(tensor.device)).contiguous()
    if isinstance(tensor, nn.Parameter):
        setattr(owner, name, nn.Parameter(data, requires_grad=tensor.requires_grad))
    else:
        owner.register_buffer(name, data)


def _retie(model: Any, table: nn.Module) -> None:
    if not on_meta(table):
        model.tie_weights()


def _configs(anatomy: Anatomy) -> list[Any]:
    configs, seen = [], set()
    stacks = [anatomy.base] + [m for m in anatomy.base.children() if hasattr(m, "config")]
    for config in [anatomy.model.config, anatomy.config, *(module.config for module in stacks)]:
        if id(config) not in seen and hasattr(config, "vocab_size"):
            seen.add(id(config))
            configs.append(config)
    return configs


def _position(index: torch.Tensor, token: int) -> int:
    return int(torch.searchsorted(index, torch.tensor(token)))


def _moved_ids(anatomy: Anatomy, index: torch.Tensor) -> dict[int, dict[str, Any]]:
    """New values of all token-id fields, per config object (by id())."""
    lookup = {int(old): new for new, old in enumerate(index.tolist())}
    moved: dict[int, dict[str, Any]] = {}
    sources = [*_configs(anatomy), getattr(anatomy.model, "generation_config", None)]
    for config in sources:
        if config is None:
            continue
        fields = {}
        for name, value in list(vars(config).items()):
            if not (name.endswith(("_token_id", "_token_ids", "_tokens", "bad_words_ids")) and value is not None):
                continue
            if name.startswith(("max_", "min_", "num_")) or name == "prompt_lookup_num_tokens":
                continue
            if isinstance(value, (int, list, tuple)) and not isinstance(value, bool):
                fields[name] = _move(value, lookup, name)
        moved[id(config)] = fields
        old = getattr(config, "pad_token_id", None)
        if anatomy.family.positions_follow_padding and old is not None and lookup.get(old) != old:
            raise LeanError(
                f"{anatomy.family.name} counts positions from the padding id {old}: keep every token before it."
            )
    return moved


def _move(value: Any, lookup: dict[int, int], name: str) -> Any:
    if isinstance(value, (list, tuple)):
        return [_move(item, lookup, name) for item in value]
    if not isinstance(value, int) or value < 0:
        return value
    if value not in lookup:
        raise LeanError(f"config.{name} is {value}, which is not among the kept tokens: add it to keep.")
    return lookup[value]
