"""Reading tables: CSV, TSV, JSON (Lines), Parquet, a folder of such files, a `datasets` folder, a hub name.

CSV and JSON are read with the standard library, so every value stays what the file says ("NA" is a label,
not a hole). pyarrow and datasets are imported only when their formats are asked for.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LeanError

Row = dict[str, Any]
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}
_SPLITS |= {"dev": "validation", "test": "test", "testing": "test"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under named columns. name: what messages call it. names: a column's label names by number."""

    name: str
    columns: tuple[str, ...]
    rows: list[Row]
    names: Mapping[str, list[str]]


def looks_like_path(source: str) -> bool:
    """Whether a source is meant as a path of this machine rather than a name."""
    return source.startswith((".", "/", "~")) or source.endswith(SUFFIXES) or Path(source).exists()


def read(
    source: str | Path,
    *,
    encoding: str | None = None,
    delimiter: str | None = None,
    config: str | None = None,
) -> dict[str, Table]:
    """The splits of a source: a file is {"train": …}, a folder or a hub dataset may have more.

    Args:
        encoding: of CSV and JSON files; None: UTF-8. delimiter: of CSV; None: a comma, or a tab in .tsv
            files.
        config: configuration of a hub dataset.

    Raises:
        LeanError: names the file, the place in it and the remedy.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, encoding, delimiter)
    if path.is_file():
        return {"train": _file(path, encoding, delimiter)}
    if looks_like_path(str(source)):
        raise LeanError(f"There is no file {source}; check the path.")
    if not _HUB_NAME.fullmatch(str(source)):
        raise LeanError(f"{source!r} is neither a file, a folder nor the name of a dataset.")
    return _hub(str(source), config)


def _file(path: Path, encoding: str | None, delimiter: str | None) -> Table:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise LeanError(f"{path} is none of {', '.join(SUFFIXES)}; rename or convert it.")
    if path.stat().st_size == 0:
        raise LeanError(f"{path} is empty; give a file with a header and rows.")
    if suffix == ".parquet":
        return _parquet(path)
    text = _decode(path, encoding or "utf-8-sig")
    if suffix in (".csv", ".tsv"):
        given = "\t" if delimiter == "\\t" else delimiter  # as a shell hands it over
        return _csv(path, text, given or ("\t" if suffix == ".tsv" else ","))
    return _json(path, text, lines=suffix != ".json")


def _decode(path: Path, encoding: str) -> str:
    try:
        return path.read_bytes().decode(encoding)
    except LookupError as error:
        raise LeanError(f"There is no encoding {encoding!r}; try utf-8, latin-1 or cp1252.") from error
    except UnicodeDecodeError as error:
        shown = encoding.removesuffix("-sig").upper()
        raise LeanError(
            f"{path} is not {shown}: byte {error.object[error.start]:#04x} at position {error.start} does "
            "not decode; save it as UTF-8 or pass its encoding, such as encoding='cp1252' (--encoding "
            "cp1252)."
        ) from error


def _csv(path: Path, text: str, delimiter: str) -> Table:
    if len(delimiter) != 1:
        raise LeanError(f"delimiter is {delimiter!r}; give one character.")
    limit = csv.field_size_limit(2**31 - 1)  # the standard 128 kB would refuse long documents
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = [column.strip() for column in next(reader, [])]
        if len(set(header)) != len(header):
            twice = next(column for column in header if header.count(column) > 1)
            raise LeanError(f"{path} has two columns named {twice!r}; rename one.")
        rows: list[Row] = []
        for fields in reader:
            if not fields:
                continue  # a blank line is no row
            if len(fields) != len(header):
                raise LeanError(
                    f"{path}, row {len(rows) + 1} (line {reader.line_num}) has {len(fields)} fields where "
                    f"the header has {len(header)}: put quotes around text that holds {delimiter!r}."
                )
            rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise LeanError(f"{path}, line {reader.line_num}: {error}; check the quotes there.") from error
    finally:
        csv.field_size_limit(limit)
    return Table(name=str(path), columns=tuple(header), rows=rows, names={})


def _json(path: Path, text: str, lines: bool) -> Table:
    rows: list[Any] = []
    place = ""
    try:
        if lines:
            for number, line in enumerate(text.split("\n"), 1):
                place = f", line {number}"
                if line.strip():
                    rows.append(json.loads(line))
        else:
            rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise LeanError(f"{path}{place} is not JSON ({error.msg}); write one object per line in .jsonl.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise LeanError(f'{path} must hold JSON objects, one per row, such as {{"text": "…", "label": "…"}}.')
    return Table(name=str(path), columns=_columns(rows), rows=rows, names={})


def _parquet(path: Path) -> Table:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise LeanError(f"Reading {path} needs pyarrow: pip install pyarrow.") from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
        columns = tuple(pyarrow.parquet.read_schema(path).names)
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise LeanError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0]}).") from error
    return Table(name=str(path), columns=columns, rows=rows, names={})


def _folder(path: Path, encoding: str | None, delimiter: str | None) -> dict[str, Table]:
    if any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json")):
        from_disk = _datasets(f"Reading the folder {path}").load_from_disk
        try:
            return _tables(from_disk(str(path)), str(path))
        except Exception as error:
            raise LeanError(f"{path} is not a readable datasets folder ({_first_line(error)}).") from error
    tables: dict[str, Table] = {}
    for file in sorted(path.iterdir()):
        split = _SPLITS.get(file.stem.lower())
        if split and file.suffix.lower() in SUFFIXES:
            if split in tables:
                raise LeanError(f"{path} has two files for {split} ({tables[split].name} and {file}); keep one.")
            tables[split] = _file(file, encoding, delimiter)
    if "train" not in tables:
        raise LeanError(f"The folder {path} holds no data: give it train.csv (or .jsonl, .parquet), or name one file.")
    return tables


def _hub(name: str, config: str | None) -> dict[str, Table]:
    load_dataset = _datasets(f"Loading the dataset {name}").load_dataset
    try:
        return _tables(load_dataset(name, config), name)
    except Exception as error:
        raise LeanError(
            f"{name!r} is neither a packaged task, a file nor a dataset that the hub gives ({_first_line(error)})."
        ) from error


def _datasets(purpose: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise LeanError(f"{purpose} needs the package datasets: pip install datasets.") from error
    return datasets


def _tables(found: Any, name: str) -> dict[str, Table]:
    """A Dataset or a DatasetDict to tables, label numbers turned into their names."""
    parts = found.items() if isinstance(found, dict) else [("train", found)]
    tables = {}
    for split, data in parts:
        if hasattr(data, "with_format"):
            data = data.with_format(None)
        names = {c: list(f.names) for c, f in data.features.items() if getattr(f, "names", None)}
        rows = [_named(row, names) for row in data]
        label = name if len(parts) == 1 else f"{name} ({split})"
        tables[_SPLITS.get(split, split)] = Table(name=label, columns=tuple(data.column_names), rows=rows, names=names)
    return tables


def _named(row: Row, names: Mapping[str, list[str]]) -> Row:
    for column, known in names.items():
        value = row[column]
        if isinstance(value, int):
            row[column] = known[value] if 0 <= value < len(known) else None  # -1 stands for no label
    return row


def _columns(rows: Iterable[Row]) -> tuple[str, ...]:
    seen: dict[str, None] = {}
    for row in rows:
        seen.update(dict.fromkeys(row))
    return tuple(seen)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
