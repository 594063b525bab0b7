"""Sentences with a label, and tiny models."""

from __future__ import annotations

import random

import torch
from transformers import BertConfig

WORDS = [
    "good",
    "fine",
    "great",
    "happy",
    "bright",
    "bad",
    "poor",
    "awful",
    "sad",
    "dark",
    "the",
    "a",
    "film",
    "book",
    "day",
    "was",
    "is",
    "very",
    "quite",
    "rather",
]


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Distinct sentences of 4 to 24 words with their label, told by one word of them."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        label = "pos" if i % 2 else "neg"
        words = [rng.choice(WORDS[10:]) for _ in range(rng.randint(2, 22))]
        words.insert(rng.randrange(len(words) + 1), rng.choice(WORDS[:5] if label == "pos" else WORDS[5:10]))
        made.append((f"{' '.join(words)} {i}", label))
    return made


TEXTS = [text for text, _ in sentences(200)] + ["0 1 2 3 4 5 6 7 8 9 Café naïve Ωmega 日本語 — “quoted”"]


def bert_config(tokenizer, **changes):
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
        **changes,
    )


def build(model_class, config, seed=0):
    """A model with weights large enough that its outputs differ visibly from input to input."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
    return model
