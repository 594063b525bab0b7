"""Altered copies of a task's training texts, which have no labels of their own: a teacher gives them.

After Tang et al. (2019, arXiv 1903.12136, section 3.3): words are masked or replaced, and a copy may be a piece of its
sentence. A replacement is drawn from the task's own words as they occur, not by part of speech, and a copy may also
be two halves of different sentences, which is not in the paper. A copy need not make sense: the teacher's answer to
it still tells how the teacher decides.
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Sequence

from ..errors import LeanError
from .base import Row, Task

MASKED, REPLACED = 0.1, 0.1  # share of the words
PIECE, JOINED = 0.25, 0.25  # share of the copies
_SHORTEST = 5  # words of a text that can give a piece
_TEXTS = ("text", "query", "body")
_BY_SENTENCE = ("text-classification", "text-regression", "embedding")


def unsuitable(task: Task) -> str | None:
    """Why copies do not suit a task, in part of a sentence; None if they do."""
    if task.kind in _BY_SENTENCE:
        return None
    return f"altered copies suit tasks with one answer per text, which {task.kind} has not: leave augment at 0"


def augmented(task: Task, copies: int, *, mask: str | None = None, seed: int = 0) -> Task:
    """The task with `copies` altered copies of each training row after the rows themselves.

    Args:
        mask: what stands for a masked word, the tokenizer's own token; None leaves the word out.

    A copy carries its row's label, which need not be true of it: train on a teacher's outputs.

    Raises:
        LeanError: a kind of task whose outputs are not one per text.
    """
    if reason := unsuitable(task):
        raise LeanError(f"Task {task.name}: {reason}.")
    other = copy.copy(task)
    rows = task.splits["train"]
    rng = random.Random(seed)
    words = {field: [w for row in rows for w in row[field].split()] for field in _TEXTS if rows and field in rows[0]}
    altered = [_altered(row, rows, words, mask, rng) for _ in range(copies) for row in rows]
    other.splits = {**task.splits, "train": [*rows, *altered]}
    other.provenance = {**task.provenance, "augmented": f"{copies} copies, seed {seed}"}
    other._features, other._fingerprint = OrderedDict(), None
    return other


def _altered(row: Row, rows: Sequence[Row], words: dict[str, list[str]], mask: str | None, rng: random.Random) -> Row:
    return {**row, **{field: _text(row[field], rng.choice(rows)[field], words[field], mask, rng) for field in words}}


def _text(text: str, other: str, words: Sequence[str], mask: str | None, rng: random.Random) -> str:
    """One altered text; never empty, unless the text is."""
    altered: list[str] = []
    for word in text.split():
        draw = rng.random()
        if draw >= MASKED + REPLACED:
            altered.append(word)
        elif draw >= MASKED:
            altered.append(rng.choice(words))
        elif mask is not None:
            altered.append(mask)
    form = rng.random()
    if form < PIECE and len(altered) >= _SHORTEST:
        size = rng.randint(_SHORTEST - 2, len(altered) - 1)
        start = rng.randint(0, len(altered) - size)
        altered = altered[start : start + size]
    elif PIECE <= form < PIECE + JOINED:
        rest = other.split()
        altered = altered[: max(1, len(altered) // 2)] + rest[len(rest) // 2 :]
    return " ".join(altered) or text
