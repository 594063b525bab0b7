"""Causal and masked language modelling.

A text longer than max_length is split into chunks; no token is lost and none is scored twice. Quality of a
causal model is bits per byte of exactly the text whose tokens are scored, so that models with different
vocabularies compare; perplexity per token stands beside it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..errors import LeanError
from .base import IGNORED, Batch, Feature, Predict, Row, Task, buckets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class CausalLM(Task):
    """Rows {"text": str}. Outputs are logits [batch, length, vocab]; labels [batch, length] are the input
    ids, -100 where a token is context only (not shifted: the loss shifts).

    Every token of the text is scored, the first one given the tokenizer's beginning-of-text token; a later
    chunk is given the last token of the chunk before.
    """

    kind = "causal-lm"
    metrics: ClassVar[Mapping[str, str]] = {"bits_per_byte": "lower", "perplexity": "lower"}
    batch_size: ClassVar[int] = 8

    def _tokenise(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Feature]:
        if not rows:
            return []
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise LeanError(
                f"task {self.name}: the tokenizer has no token that begins a text; set tokenizer.bos_token."
            )
        texts = [row["text"] for row in rows]
        encoded = tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)
        features: list[Feature] = []
        for text, ids in zip(texts, encoded["input_ids"], strict=True):
            # The bytes of a text are counted once, with its first chunk: limits count rows, so sums are
            # exact.
            pending = len(text.encode())
            before = start
            for chunk in _chunks(list(ids), self.max_length - 1):
                features.append(
                    {
                        "input_ids": [before, *chunk],
                        "attention_mask": [1] * (1 + len(chunk)),
                        "labels": [IGNORED, *chunk],
                        "bytes": pending,
                    }
                )
                before, pending = chunk[-1], 0
        return features

    def _outputs(self, model: PreTrainedModel, inputs: Batch) -> Tensor:
        inputs = {k: v for k, v in inputs.items() if k != "token_type_ids"}
        return model(**inputs, use_cache=False).logits  # [batch, length, vocab]

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)

    def _evaluate(
        self, predict: Predict, tokenizer: PreTrainedTokenizerBase, features: list[Feature], batch_size: int
    ) -> dict[str, float]:
        nats, tokens = 0.0, 0
        for indices in buckets(features, batch_size):
            batch = self.collate(tokenizer, [features[i] for i in indices])
            for logits, labels in zip(
                predict(batch), batch["labels"], strict=True
            ):  # a row at a time: logits are large
                scores, counted = _row_nats(logits[:-1], labels[1:])
                nats, tokens = nats + scores, tokens + counted
        size = sum(feature["bytes"] for feature in features)
        return {
            "bits_per_byte": nats / math.log(2) / size,
            "perplexity": math.exp(min(nats / tokens, 700.0)),
            "loss": nats / tokens,
        }


class MaskedLM(Task):
    """Rows {"text": str}. A fixed 15% of the tokens (by seed and place, the same in every run) become the
    mask token; outputs are logits [batch, length, vocab], labels [batch, length] are -100 wherever nothing
    was masked.
    """

    kind = "masked-lm"
    metrics: ClassVar[Mapping[str, str]] = {"masked_accuracy": "higher", "masked_bits": "lower"}
    batch_size: ClassVar[int] = 16

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Sequence[Row]],
        *,
        probability: float = 0.15,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(name, splits, **kwargs)
        if not 0 < probability < 1:
            raise LeanError(f"task {name}: probability is {probability}; give the share of masked tokens, in (0, 1).")
        self.probability, self.seed = probability, seed

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "probability": self.probability, "seed": self.seed}

    def _tokenise(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Feature]:
        if not rows:
            return []
        mask = tokenizer.mask_token_id
        if mask is None:
            raise LeanError(f"task {self.name}: the tokenizer has no mask token, so masked-lm does not suit it.")
        room = self.max_length - tokenizer.num_special_tokens_to_add()
        encoded = tokenizer(
            [row["text"] for row in rows],
            add_special_tokens=False,
            truncation=False,
            padding=False,
            verbose=False,
        )
        before, after = _frame(tokenizer)
        features: list[Feature] = []
        for ids in encoded["input_ids"]:
            for chunk in _chunks(list(ids), room):
                # Seeded by place, not by a running state: the same row is masked alike under every limit.
                rng = random.Random(f"{self.seed}/{len(features)}")
                count = max(1, round(self.probability * len(chunk)))
                hidden = set(rng.sample(range(len(chunk)), count))
                seen = [mask if i in hidden else token for i, token in enumerate(chunk)]
                labels = [token if i in hidden else IGNORED for i, token in enumerate(chunk)]
                features.append(
                    {
                        "input_ids": [*before, *seen, *after],
                        "attention_mask": [1] * (len(before) + len(chunk) + len(after)),
                        "labels": [IGNORED] * len(before) + labels + [IGNORED] * len(after),
                    }
                )
        return features

    def _outputs(self, model: PreTrainedModel, inputs: Batch) -> Tensor:
        return model(**inputs).logits  # [batch, length, vocab]

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)

    def _evaluate(
        self, predict: Predict, tokenizer: PreTrainedTokenizerBase, features: list[Feature], batch_size: int
    ) -> dict[str, float]:
        nats, tokens, right = 0.0, 0, 0
        for indices in buckets(features, batch_size):
            batch = self.collate(tokenizer, [features[i] for i in indices])
            for logits, labels in zip(predict(batch), batch["labels"], strict=True):
                scores, counted = _row_nats(logits, labels)
                nats, tokens = nats + scores, tokens + counted
                chosen = labels != IGNORED
                right += (logits[chosen.to(logits.device)].argmax(-1).cpu() == labels[chosen]).sum().item()
        return {
            "masked_accuracy": right / tokens,
            "masked_bits": nats / tokens / math.log(2),
            "loss": nats / tokens,
        }


def _chunks(ids: list[int], size: int) -> list[list[int]]:
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text, seen by encoding one."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    return [], []


def _row_nats(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """Cross-entropy (nats) and count of the scored positions; logits [length, vocab], labels [length]."""
    chosen = labels != IGNORED
    kept = logits[chosen.to(logits.device)].float()
    nats = F.cross_entropy(kept, labels[chosen].to(logits.device), reduction="sum")
    return nats.double().item(), int(chosen.sum())
