"""Fixed splits of the user's own rows."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from ..errors import LeanError
from .base import Row
from .sources import Table

FEWEST = 20  # rows, below which no split is worth measuring on


def split_rows(splits: dict[str, list[Row]], name: str, seed: int, stratify: bool) -> dict[str, list[Row]]:
    """Shuffle all splits and draw the missing ones from the training rows; one seed, one result."""
    rng = random.Random(seed)
    for split in ("train", "validation", "test"):
        rng.shuffle(splits.setdefault(split, []))
    train = splits["train"]
    missing = [split for split in ("test", "validation") if not splits[split]]
    if missing and len(train) < FEWEST:
        raise LeanError(
            f"{name} has {len(train)} rows; at least {FEWEST} are needed to split off "
            f"{' and '.join(missing)}: add rows or give files of their own."
        )
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in train:
        groups[row["label"] if stratify else None].append(row)
    share = min(0.1, 2_000 / len(train))
    sizes = {key: round(share * len(group)) for key, group in groups.items()}
    for split in missing:
        for key, group in groups.items():
            # Every class keeps a training row; a class too rare to share stays in training whole.
            count = min(sizes[key], len(group) - 1)
            splits[split] += group[:count]
            del group[:count]
        if not splits[split]:
            raise LeanError(f"{name} has too few rows of each class to split off {split}; give a file of its own.")
        rng.shuffle(splits[split])
    if missing:
        splits["train"] = [row for group in groups.values() for row in group]
        rng.shuffle(splits["train"])
    return splits


def check_seen(splits: dict[str, list[Row]], tables: dict[str, Table], column: str) -> None:
    known = {row["label"] for row in splits["train"]}
    for split in ("validation", "test"):
        for row in splits[split]:
            if row["label"] not in known:
                name = tables[split].name if split in tables else tables["train"].name
                raise LeanError(
                    f"{name}: the label {row['label']!r} (column {column!r}, split {split}) does not "
                    "occur in the training rows; add training rows of it or remove it."
                )
