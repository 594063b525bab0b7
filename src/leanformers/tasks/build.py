"""From tables to a task: columns, kind, splits; everything wrong with the data is said here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import LeanError
from .base import Row, Task
from .embedding import Embedding
from .language import CausalLM, MaskedLM
from .sources import Table, read
from .splitting import check_seen, split_rows
from .text import TextClassification, TextRegression

KINDS = ("text-classification", "text-regression", "embedding", "causal-lm", "masked-lm")
MAX_LENGTH = {"causal-lm": 256, "masked-lm": 128}


def own(
    source: str | Path,
    *,
    kind: str | None = None,
    text: str | None = None,
    label: str | None = None,
    query: str | None = None,
    body: str | None = None,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    size: int | None = None,
    max_length: int | None = None,
    metric: str | None = None,
    objective: str = "teacher",
    query_prefix: str = "",
    body_prefix: str = "",
    drop_empty: bool = False,
    seed: int = 0,
    name: str | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
    config: str | None = None,
) -> Task:
    """A task on the user's own data.

    Args:
        source: a file, a folder of train/validation/test files, a `datasets` folder or a hub name.
        kind: one of KINDS; None: told from the columns (label: classification, or regression where the
            labels are fractional numbers; query and body: embedding).
        text, label, query, body: columns; "text" and "label" are the defaults where such columns exist.
        validation, test: a split of the source or a file of its own; None: the split of that name, or else
            a fixed, seeded share of the training rows (a tenth, at most 2,000; classification: stratified).
        size: training rows to keep. drop_empty: leave out rows without text or label instead of refusing
            them.

    Raises:
        LeanError: see the module docstring.
    """
    if kind is not None and kind not in KINDS:
        raise LeanError(f"There is no kind of task {kind!r}; choose {', '.join(KINDS)}.")
    tables = read(source, encoding=encoding, delimiter=delimiter, config=config)
    if "train" not in tables:
        raise LeanError(f"{source} has no split train (it has {', '.join(tables)}).")
    chosen = {"train": tables["train"]}
    for split, given in (("validation", validation), ("test", test)):
        if given is not None and str(given) in tables:
            chosen[split] = tables[str(given)]
        elif given is not None:
            chosen[split] = read(given, encoding=encoding, delimiter=delimiter)["train"]
        elif split in tables:
            chosen[split] = tables[split]
    columns, kind = _columns(chosen["train"], kind, text, label, query, body)
    splits = {split: _rows(table, columns, drop_empty) for split, table in chosen.items()}
    if kind is None:
        kind = "text-regression" if _fractional(splits["train"]) else "text-classification"
    labels: list[str] = []
    if kind == "text-classification":
        labels = _labels(splits, chosen, columns["label"])
    elif kind == "text-regression":
        for split, rows in splits.items():
            _numbers(rows, chosen[split], columns["label"])
    splits = split_rows(splits, chosen["train"].name, seed, stratify=bool(labels))
    if labels:
        check_seen(splits, chosen, columns["label"])
    if size is not None:
        if size < 2:
            raise LeanError(f"size is {size}; give at least 2 training rows.")
        splits["train"] = splits["train"][:size]

    settings: dict[str, Any] = {"max_length": max_length or MAX_LENGTH.get(kind, 128), "metric": metric}
    called = name or Path(str(source)).stem
    if kind == "text-classification":
        return TextClassification(called, splits, labels=labels, **settings)
    if kind == "text-regression":
        return TextRegression(called, splits, **settings)
    if kind == "embedding":
        prefixes = {"query_prefix": query_prefix, "body_prefix": body_prefix}
        return Embedding(called, splits, objective=objective, **prefixes, **settings)
    return (CausalLM if kind == "causal-lm" else MaskedLM)(called, splits, **settings)


def _columns(
    table: Table, kind: str | None, text: str | None, label: str | None, query: str | None, body: str | None
) -> tuple[dict[str, str], str | None]:
    """Field of a row -> column of the table, and the kind as far as the columns tell it."""
    if (query is None) != (body is None):
        raise LeanError("Pairs need both: give query= and body= (--query, --body).")
    if query is not None and body is not None:
        if kind not in (None, "embedding") or label is not None:
            raise LeanError(f"Query and body columns make an embedding task, not {kind or 'one with labels'}.")
        fields, kind = {"query": query, "body": body}, "embedding"
    else:
        fields = {"text": text or "text"}
        if label is None and "label" in table.columns and kind in (None, "text-classification", "text-regression"):
            label = "label"
        if label is not None:
            if kind not in (None, "text-classification", "text-regression"):
                raise LeanError(f"A {kind} task takes no label column; leave label out.")
            fields["label"] = label
        elif kind is None or kind.startswith("text-"):
            shown = ", ".join(table.columns)
            raise LeanError(
                f"{table.name}: no label column is given (columns: {shown}); pass label= (--label), "
                "query= and body=, or kind= causal-lm, masked-lm or embedding for texts alone."
            )
    for field, column in fields.items():
        _require(table, column, field)
    return fields, kind


def _require(table: Table, column: str, field: str) -> None:
    if column not in table.columns:
        shown = ", ".join(table.columns) or "none"
        other = next((sign for sign in ";\t|" if len(table.columns) == 1 and sign in shown), None)
        hint = f" If {other!r} separates them, pass delimiter={other!r} (--delimiter)." if other else ""
        raise LeanError(f"{table.name} has no column {column!r} for {field}; its columns are {shown}.{hint}")


def _rows(table: Table, columns: dict[str, str], drop_empty: bool) -> list[Row]:
    """The wanted columns alone, texts stripped; refuses (or drops) rows where one is empty."""
    for field, column in columns.items():
        _require(table, column, field)
    kept: list[Row] = []
    empty: list[tuple[int, str]] = []
    for number, row in enumerate(table.rows, 1):
        values: Row = {}
        for field, column in columns.items():
            value = row.get(column)
            if field != "label" and value is not None and not isinstance(value, str):
                raise LeanError(
                    f"{table.name}, row {number}: column {column!r} holds a {type(value).__name__}, not "
                    "text; choose another column for it."
                )
            if field == "label" and isinstance(value, list | dict):
                raise LeanError(
                    f"{table.name}, row {number}: column {column!r} holds a {type(value).__name__}; a label "
                    "is one word or number."
                )
            values[field] = value.strip() if isinstance(value, str) else value
        missing = [columns[f] for f, v in values.items() if v is None or v == "" or v != v]  # v != v: not a number
        if missing:
            empty.append((number, missing[0]))
        else:
            kept.append(values)
    if empty and not drop_empty:
        first, column = empty[0]
        raise LeanError(
            f"{table.name} has {len(empty)} row{'s' if len(empty) > 1 else ''} with an empty value "
            f"(first: row {first}, column {column!r}); fill them in or pass drop_empty=True (--drop-empty)."
        )
    if not kept:
        raise LeanError(f"{table.name} has no rows{' but empty ones' if empty else ''}; give it some.")
    return kept


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _fractional(rows: Sequence[Row]) -> bool:
    """Whether labels are many different numbers, some of them fractional: a rating, not a class."""
    numbers = [_number(row["label"]) for row in rows]
    if any(number is None for number in numbers):
        return False
    return len(set(numbers)) > 20 and any(number != int(number) for number in numbers if number is not None)


def _labels(splits: dict[str, list[Row]], tables: dict[str, Table], column: str) -> list[str]:
    """Turn labels into strings; return the classes in the data set's own order, by number or by alphabet."""
    for rows in splits.values():
        for row in rows:
            value = row["label"]
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            row["label"] = str(value)
    counts = Counter(row["label"] for row in splits["train"])
    name = tables["train"].name
    if len(counts) == 1:
        raise LeanError(f"{name}: column {column!r} has one class only ({next(iter(counts))!r}); give at least two.")
    if len(counts) > 20 and len(counts) > len(splits["train"]) / 2:
        raise LeanError(
            f"{name}: column {column!r} has {len(counts)} different values in {len(splits['train'])} "
            "rows, too many for classes; choose another label column, or kind='text-regression' for numbers."
        )
    given = [label for label in tables["train"].names.get(column, []) if label in counts]
    if len(given) == len(counts):
        return given
    if all(label.lstrip("-").isdecimal() for label in counts):
        return sorted(counts, key=int)
    return sorted(counts)


def _numbers(rows: list[Row], table: Table, column: str) -> None:
    for number, row in enumerate(rows, 1):
        value = _number(row["label"])
        if value is None:
            raise LeanError(
                f"{table.name}, row {number}: {row['label']!r} in column {column!r} is no number; a "
                "text-regression task needs numbers."
            )
        row["label"] = value
