"""Tiny models and tasks to train: seconds, no files, no network."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

GOOD, BAD = ("good", "fine", "great", "nice"), ("bad", "poor", "awful", "dull")
OTHER = (
    "a",
    "the",
    "of",
    "film",
    "plot",
    "actor",
    "scene",
    "it",
    "was",
    "is",
    "and",
    "but",
    "with",
    "very",
    "not",
)
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", *GOOD, *BAD, *OTHER)


def make_tokenizer(words: Sequence[str]) -> Any:
    """One token per word, [CLS] and [SEP] around."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="<s>",
    )


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer(WORDS)


@pytest.fixture(scope="session")
def cut_tokenizer() -> Any:
    """The same with a third of the ordinary words gone, so that ids move."""
    return make_tokenizer(WORDS[:6] + WORDS[7:20])


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS[6:]) for _ in range(rng.randint(2, 20))) for _ in range(count)]


def label(text: str) -> str:
    words = text.split()
    return "yes" if sum(w in GOOD for w in words) > sum(w in BAD for w in words) else "no"


def make_sentiment(count: int = 96) -> Any:
    """A text classification task of so many training sentences."""
    from leanformers.tasks.text import TextClassification

    rows = [{"text": text, "label": label(text)} for text in sentences(count)]
    splits = {"train": rows, "validation": rows[:32], "test": rows[:32]}
    return TextClassification("toy", splits, labels=["no", "yes"], max_length=32)


@pytest.fixture
def sentiment() -> Callable[..., Any]:
    return make_sentiment


@pytest.fixture
def language() -> Callable[..., Any]:
    """A causal language-modelling task."""

    def make(count: int = 24) -> Any:
        from leanformers.tasks.language import CausalLM

        rows = [{"text": text} for text in sentences(count)]
        return CausalLM("toy-lm", {"train": rows, "validation": rows[:8], "test": rows[:8]}, max_length=24)

    return make


@pytest.fixture
def embedding() -> Callable[..., Any]:
    """Texts alone, or pairs with objective="pairs"."""

    def make(count: int = 24, **options: Any) -> Any:
        from leanformers.tasks.embedding import Embedding

        texts = sentences(2 * count)
        rows = [{"text": text} for text in texts[:count]]
        if options:
            rows = [{"query": a, "body": b} for a, b in zip(texts[:count], texts[count:], strict=True)]
        return Embedding("toy-texts", {"train": rows, "validation": rows, "test": rows}, max_length=32, **options)

    return make


def make_bert(layers: int = 2, width: int = 16, heads: int = 2, labels: int = 2, seed: int = 0, **more: Any) -> Any:
    """A tiny BERT: classifier, or bare encoder with labels=0. Dropout 0.1 as stock."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=40,
        **(more | ({"num_labels": labels} if labels else {})),
    )
    return (BertForSequenceClassification if labels else BertModel)(config).eval()


@pytest.fixture
def bert() -> Callable[..., Any]:
    return make_bert


@pytest.fixture
def llama() -> Callable[..., Any]:
    """A tiny LLaMA with grouped keys and a tied head."""

    def make(layers: int = 2, width: int = 16, heads: int = 4, groups: int = 2, vocabulary: int = len(WORDS)) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            intermediate_size=2 * width,
            max_position_embeddings=40,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=5,
            eos_token_id=3,
        )
        return LlamaForCausalLM(config).eval()

    return make
