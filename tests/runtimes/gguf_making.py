"""Small models and tokenizers that llama.cpp takes, and what a GGUF file holds, for the tests of GGUF."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from families import TINY
from leanformers.anatomy import Anatomy
from leanformers.runtimes.gguf.vocabulary import _RULES
from leanformers.surgery import DropSublayers, KeepHeads, KeepNeurons, apply
from vocabularies import CHAT, TEXTS

# Sizes in multiples of 32, as quantised rows want them.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
RULES = tuple(name for name, _ in _RULES.values())


def tiny(family: str = "llama", **fields: Any) -> Any:
    """One of the tiny decoders in sizes that suit llama.cpp: three layers, seven for gemma3's pattern of six."""
    own: dict[str, Any] = {}
    if family in ("qwen3", "gemma3"):
        own["head_dim"] = 32
    if family == "gemma3":
        own |= {"query_pre_attn_scalar": 32, "num_hidden_layers": 7, "layer_types": None}
    return TINY[family](**(SIZES | own | fields))


def make_uneven(model: Any) -> Any:
    """96, 64 and 96 neurons, and 4, 4 and 2 heads."""
    layers = Anatomy.of(model).layers
    apply(model, KeepNeurons(path=layers[1].feed_forward.path, size=64), keep=torch.arange(64) + 7)
    apply(model, KeepHeads(path=layers[2].attention.path, size=1), keep=torch.tensor([1]))
    return model


def without_parts(*, attention: tuple[int, ...], feed_forward: int) -> Any:
    """A LLaMA whose layers of these indices lack their attention, and one its feed-forward."""
    model = tiny()
    for index in attention:
        apply(model, DropSublayers(path=f"layers.{index}", sublayers=("attention",)))
    return apply(model, DropSublayers(path=f"layers.{feed_forward}", sublayers=("feed_forward",)))


class File(NamedTuple):
    """What stands in a GGUF file: metadata, arrays [out, in], and the name of each array's type."""

    fields: dict[str, Any]
    tensors: dict[str, Any]
    types: dict[str, str]


def read(path: Any) -> File:
    """By gguf's own reader."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor.data.copy() for tensor in reader.tensors}
    return File(fields, tensors, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors})


def tokenizer_of(rule: str = "gpt-2", *, first: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits text by one of llama.cpp's rules, trained on the spot.

    first: put the beginning-of-text token before every text.
    """
    (kinds, pattern), (_, whole) = next((key, value) for key, value in _RULES.items() if value[0] == rule)
    parts: list[Any] = []
    if "Digits" in kinds:
        parts.append(pre_tokenizers.Digits(individual_digits=True))
    if pattern:
        parts.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    backend = Tokenizer(models.BPE(ignore_merges=whole))
    backend.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    if first:
        start = ("<|start|>", backend.token_to_id("<|start|>"))
        backend.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[start])
    settings = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|end|>", "chat_template": CHAT}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(settings | options))


def changed(tokenizer: PreTrainedTokenizerFast, **rooms: Any) -> PreTrainedTokenizerFast:
    """The tokenizer with some rooms of its `tokenizer.json` replaced; those of the model are merged in."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    for name, room in rooms.items():
        spec[name] = spec["model"] | room if name == "model" else room
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="<|end|>")
