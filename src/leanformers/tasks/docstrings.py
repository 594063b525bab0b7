"""Three packaged tasks on docstrings: what the installed scientific packages say about themselves.

Some 20 MB of real text that is on every machine which runs leanformers, read from the source files with
`ast` (nothing is imported) and kept per package and version in the cache folder. The packages found and
their versions are part of a task's provenance: with others the numbers are others. A file's docstrings all
go to one split, since neighbours in a file repeat each other.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import random
import re
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from ..errors import LeanError
from .base import Row, Task
from .cache import cache_dir
from .embedding import Embedding
from .language import CausalLM
from .text import TextClassification

# import name -> distribution: leanformers' dependencies and theirs, so that most of them are always there
PACKAGES = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "huggingface_hub": "huggingface_hub",
    "networkx": "networkx",
    "numpy": "numpy",
    "optuna": "optuna",
    "pandas": "pandas",
    "peft": "peft",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "sqlalchemy": "SQLAlchemy",
    "sympy": "sympy",
    "torch": "torch",
    "transformers": "transformers",
}
_ALIASES = ("scikit-learn", "scikit learn", "pytorch", "np", "pd", "nx", "hf", "hugging face", "huggingface")
_SKIPPED = ("tests", "test", "testing", "__pycache__", "_vendor", "externals")
_FORMAT = 1  # of the cached extraction
SEED = 0


def docstrings_search(
    *, size: int | None = 4_000, max_length: int = 128, metric: str | None = None, objective: str = "teacher"
) -> Task:
    """Find the body of a docstring by its summary line. Train `size` pairs, validation 500, test 1,000.

    Without labels to learn from it follows a teacher's vectors; `objective="pairs"` learns from the pairs.
    """
    rows, found = _read(_pair)
    splits = _split(rows, {"test": 1_000, "validation": 500, "train": size}, "docstrings-search")
    return Embedding(
        "docstrings-search",
        splits,
        max_length=max_length,
        metric=metric,
        objective=objective,
        provenance=found,
    )


def docstrings_lm(*, size: int | None = 2_000, max_length: int = 256, metric: str | None = None) -> Task:
    """Language modelling of whole docstrings of 200 to 2,000 characters; validation 100, test 200."""
    rows, found = _read(_whole)
    splits = _split(rows, {"test": 200, "validation": 100, "train": size}, "docstrings-lm")
    return CausalLM("docstrings-lm", splits, max_length=max_length, metric=metric, provenance=found)


def docstrings_library(*, size: int | None = 2_000, max_length: int = 64, metric: str | None = None) -> Task:
    """Which library wrote this? Equal shares of every library with at least 600 docstrings; validation 500,
    test 1,000.

    The libraries' names are masked, but the vocabulary of a field is not: TF-IDF does well here, so prefer
    *sentiment* for claims about quality.
    """
    rows, found = _read(_labelled)
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["label"]].append(row)
    labels = sorted(label for label, group in groups.items() if len(group) >= 600)
    if len(labels) < 2:
        raise LeanError(
            f"Task docstrings-library needs two large libraries and found {', '.join(labels) or 'none'}; "
            "install scipy, sympy, scikit-learn or transformers."
        )
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for label in labels:
        counts = {"test": 1_000 // len(labels), "validation": 500 // len(labels)}
        train = None if size is None else max(1, size // len(labels))
        part = _split(groups[label], {**counts, "train": train}, "docstrings-library")
        for split, chosen in part.items():
            splits[split] += chosen
    for split, chosen in splits.items():
        splits[split] = [{**row, "text": masked(row["text"])} for row in chosen]
        random.Random(SEED).shuffle(splits[split])
    return TextClassification(
        "docstrings-library", splits, labels=labels, max_length=max_length, metric=metric, provenance=found
    )


def docstring_texts(count: int, seed: int = SEED) -> list[str]:
    """That many docstrings of whatever length, drawn at random: what arrives where texts are of all lengths."""
    rows, _ = _read(lambda record: {"text": record["text"]} if record["text"].strip() else None)
    return [row["text"] for row in random.Random(seed).sample(rows, min(count, len(rows)))]


# ---------------------------------------------------------------------- what a docstring becomes
def _pair(record: Row) -> Row | None:
    """Summary (first paragraph, one line) and the rest; None where either is too short to mean anything."""
    summary, _, body = record["text"].partition("\n\n")
    query, body = " ".join(summary.split()), " ".join(body.split())
    if not 20 <= len(query) <= 200 or len(query.split()) < 4 or len(body) < 100 or ">>>" in query:
        return None
    # About what 128 tokens hold: TF-IDF then reads no more than a transformer does.
    return {"query": query, "body": body[:600]}


def _whole(record: Row) -> Row | None:
    return {"text": record["text"]} if 200 <= len(record["text"]) <= 2_000 else None


def _labelled(record: Row) -> Row | None:
    text = " ".join(record["text"].split())[:1_000]
    return {"text": text, "label": record["package"]} if len(text) >= 100 else None


def masked(text: str) -> str:
    """The text with every name of a library replaced by "library"."""
    return _NAMES.sub("library", text)


_LONGEST_FIRST = sorted({*PACKAGES, *_ALIASES}, key=len, reverse=True)
_NAMES = re.compile(
    rf"(?<![A-Za-z])({'|'.join(map(re.escape, _LONGEST_FIRST))})(?![A-Za-z])",
    re.IGNORECASE,
)


# ---------------------------------------------------------------------- splits
def _split(rows: Sequence[Row], sizes: dict[str, int | None], name: str) -> dict[str, list[Row]]:
    """Fill the splits in the order of `sizes` with whole files, drawn in a fixed random order."""
    files: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        files[row["file"]].append({k: v for k, v in row.items() if k != "file"})
    rng = random.Random(SEED)
    order = sorted(files)
    rng.shuffle(order)
    splits: dict[str, list[Row]] = {}
    for split, size in sizes.items():
        taken: list[Row] = []
        while order and (size is None or len(taken) < size):
            taken += files[order.pop()]
        if len(taken) < (size or 2) and split != "train":
            raise LeanError(
                f"Task {name} found too few docstrings for its {split} split ({len(taken)} of {size}); "
                f"install more of {', '.join(PACKAGES.values())}."
            )
        rng.shuffle(taken)
        splits[split] = taken[:size]
    return {split: splits[split] for split in ("train", "validation", "test")}


def _read(convert: Callable[[Row], Row | None]) -> tuple[list[Row], dict[str, str]]:
    """Converted docstrings of all packages, each text once, with its file; and the packages' versions."""
    rows: list[Row] = []
    seen: set[str] = set()
    found: dict[str, str] = {}
    for package, distribution in PACKAGES.items():
        records = _package(package, distribution)
        if records is None:
            continue
        found[package] = metadata.version(distribution)
        for record in records:
            row = convert(record)
            if row is None:
                continue
            # Each field on its own: two pairs that share a summary have two right answers, and only one
            # counts.
            keys = [f"{field}:{row[field].lower()[:300]}" for field in ("query", "body", "text") if field in row]
            if not seen.isdisjoint(keys):
                continue
            seen.update(keys)
            rows.append({**row, "file": f"{package}/{record['file']}"})
    if not found:
        raise LeanError(f"The docstring tasks read installed packages, and none of {', '.join(PACKAGES)} is there.")
    return rows, found


# ---------------------------------------------------------------------- extraction
def _package(package: str, distribution: str) -> list[Row] | None:
    """All docstrings of a package, from the cache if its version is there; None if not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
    cached = cache_dir() / "docstrings" / f"{package}-{version}-{_FORMAT}.jsonl"
    if not cached.is_file():
        cached.parent.mkdir(exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{package}-", dir=cached.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                for record in _extract(package, Path(spec.submodule_search_locations[0])):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
            os.replace(temporary, cached)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    with cached.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _extract(package: str, folder: Path) -> Iterator[Row]:
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if any(part in _SKIPPED for part in relative.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other people's invalid escapes
                tree = ast.parse(source) if '"""' in source else None
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        if tree is not None:
            for text in _texts(tree):
                yield {"package": package, "file": relative.as_posix(), "text": text}


def _texts(tree: ast.AST) -> Iterator[str]:
    """Docstrings of public classes and functions, of 80 characters and more, in the order of the source."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in sorted(nodes, key=lambda n: n.lineno):
        text = None if node.name.startswith("_") else ast.get_docstring(node)
        if text is not None and len(text) >= 80:
            yield text.encode(errors="replace").decode()  # lone surrogates cannot be stored
