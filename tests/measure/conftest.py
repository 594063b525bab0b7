"""A tiny classification task and tiny random models: measuring needs no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

VOCAB = 50


class Tokenizer:
    """Stands for a tokenizer: a text is its token ids; `split` > 1 makes that many tokens of each."""

    def __init__(self, split: int = 1) -> None:
        self.split = split


class TinyTask:
    """Rows of token ids of 3 to 12 tokens with a label; collates to the longest of the batch."""

    kind = "text-classification"
    name = "tiny"
    metric = "accuracy"
    better = "higher"

    def __init__(self, rows: int = 40, chunks: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = [
            {"ids": torch.randint(1, VOCAB, (3 + i % 10,), generator=generator).tolist(), "label": i % 2}
            for i in range(rows)
        ]
        self.chunks = chunks

    def features(self, tokenizer: Any, split: str = "test", limit: int | None = None) -> list[dict[str, Any]]:
        made = []
        for row in self.rows[:limit]:
            ids = [i for i in row["ids"] for _ in range(tokenizer.split)]
            pieces = [ids[k : k + 5] for k in range(0, len(ids), 5)] if self.chunks else [ids]
            made += [{"input_ids": p, "attention_mask": [1] * len(p), "labels": row["label"]} for p in pieces]
        return made

    def collate(self, tokenizer: Any, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(f["input_ids"]) for f in features)
        batch = {
            key: torch.tensor([f[key] + [0] * (longest - len(f[key])) for f in features])
            for key in ("input_ids", "attention_mask")
        }
        return batch | {"labels": torch.tensor([f["labels"] for f in features])}

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def evaluate(
        self,
        predict: Any,
        tokenizer: Any,
        split: str = "test",
        limit: int | None = None,
        batch_size: int | None = None,
    ) -> dict[str, float]:
        rows, right = self.features(tokenizer, split, limit), []
        size = batch_size or len(rows)
        for low in range(0, len(rows), size):
            batch = self.collate(tokenizer, rows[low : low + size])
            right.append(predict(batch).argmax(-1).cpu() == batch["labels"])
        return {"accuracy": torch.cat(right).float().mean().item()}

    def quality(self, metrics: dict[str, float]) -> float:
        return metrics["accuracy"]


def make_bert(layers: int = 2, attention: str = "sdpa", hidden_size: int = 32) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        attn_implementation=attention,
    )
    return BertForSequenceClassification(config).eval()


def make_llama(attention: str = "sdpa", tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def bert() -> Any:
    return make_bert()


@pytest.fixture
def task() -> TinyTask:
    return TinyTask()


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture
def make() -> dict[str, Any]:
    """The makers of what the fixtures hold, for tests that need them with other sizes."""
    return {"bert": make_bert, "llama": make_llama, "task": TinyTask, "tokenizer": Tokenizer}
