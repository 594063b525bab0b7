"""Which library wrote this paragraph? Docstrings of 96 to 256 tokens, whole, for methods that need long texts.

As *docstrings-library*, with the libraries' names masked and whole files in one split, but longer texts: 250 to train
on, 25 for validation and 150 to test on from each library that has so many, the twelve largest at most. TF-IDF reads
the very same words.
"""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from leanformers.tasks.base import Row
from leanformers.tasks.docstrings import _labelled, _read, _split, masked
from leanformers.tasks.text import TextClassification

SHORTEST, LONGEST, CLASSES = 96, 256, 12
SIZES = {"test": 150, "validation": 25, "train": 250}


class Cut(TextClassification):
    """The same texts, each cut to as many tokens as ``kept`` says of its length; the last one stays."""

    kept: Any = staticmethod(lambda length: length)

    def _tokenise(self, tokenizer: Any, rows: Any) -> Any:
        features = super()._tokenise(tokenizer, rows)
        return [
            {
                name: _cut(value, self.kept(len(value))) if isinstance(value, list) else value
                for name, value in f.items()
            }
            for f in features
        ]


def _cut(values: list[int], count: int) -> list[int]:
    return values if count >= len(values) else [*values[: max(1, count - 1)], values[-1]]


def paragraphs(tokenizer: Any, *, train: int | None = None, test: int | None = None) -> TextClassification:
    """The task, for texts as this tokenizer counts them. train, test: only the first so many rows."""
    rows, found = _read(_labelled)
    rows = [{**row, "text": masked(row["text"])} for row in rows if len(row["text"]) >= SHORTEST]
    counts = [len(ids) for ids in tokenizer([row["text"] for row in rows], verbose=False)["input_ids"]]
    groups: dict[str, list[Row]] = defaultdict(list)
    for row, count in zip(rows, counts, strict=True):
        if SHORTEST <= count <= LONGEST:
            groups[row["label"]].append(row)
    large = sorted(groups, key=lambda label: (-len(groups[label]), label))
    labels = sorted([label for label in large if len(groups[label]) >= sum(SIZES.values())][:CLASSES])
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for label in labels:
        for split, chosen in _split(groups[label], dict(SIZES), "paragraphs").items():
            splits[split] += chosen
    for chosen in splits.values():
        random.Random(0).shuffle(chosen)
    splits["train"], splits["test"] = splits["train"][:train], splits["test"][:test]
    return TextClassification("paragraphs", splits, labels=labels, max_length=LONGEST, provenance=found)


def cut(task: TextClassification, kept: Any) -> Cut:
    """The task with texts of n tokens cut to ``kept(n)``."""
    made = Cut(task.name, task.splits, labels=task.labels or [], max_length=task.max_length, provenance=task.provenance)
    made.kept = kept
    return made
