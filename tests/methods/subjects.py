"""Small subjects for the tests of methods: a tiny encoder and a tiny decoder on a task of their own."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as T

from leanformers.methods import Subject
from leanformers.tasks.language import CausalLM
from leanformers.tasks.text import TextClassification
from vocabularies import CORPUS, byte_level, wordpiece

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


@cache
def _trained(make: Any) -> Any:
    return make()  # training breaks ties by chance, so one serves all


def encoder(seed: int = 0, **fields: Any) -> Subject:
    tokenizer = _trained(wordpiece)
    torch.manual_seed(seed)
    config = T.BertConfig(vocab_size=len(tokenizer), num_labels=2, **{**SIZES, **fields})
    rows = [{"text": text, "label": "long" if len(text) > 150 else "short"} for text in CORPUS]
    splits = {"train": rows, "validation": rows[:20], "test": rows[20:40]}
    task = TextClassification("t", splits, labels=["long", "short"])
    model = T.BertForSequenceClassification(config).eval()
    return Subject(model=model, tokenizer=tokenizer, task=task)


def decoder(seed: int = 0, **fields: Any) -> Subject:
    tokenizer = _trained(byte_level)
    torch.manual_seed(seed)
    sizes = {**SIZES, "num_key_value_heads": 2, **fields}
    model = T.LlamaForCausalLM(T.LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    rows = [{"text": text} for text in CORPUS]
    task = CausalLM("t", {"train": rows, "validation": rows[:10], "test": rows[:10]}, max_length=48)
    return Subject(model=model, tokenizer=tokenizer, task=task)


def conv1d() -> Subject:
    """GPT-2, whose linears are stored [in, out] and whose query, key and value are one."""
    subject = decoder()
    torch.manual_seed(0)
    config = T.GPT2Config(vocab_size=len(subject.tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)
    subject.model = T.GPT2LMHeadModel(config).eval()
    return subject


BOTH = {"encoder": encoder, "decoder": decoder}
EVERY = {**BOTH, "conv1d": conv1d}


def outputs(subject: Subject, limit: int = 8) -> torch.Tensor:
    """What the model says of the first test rows."""
    batch = next(iter(subject.task.batches(subject.tokenizer, "test", limit, limit=limit)))
    with torch.no_grad():
        return subject.task.forward(subject.model.eval(), batch)
