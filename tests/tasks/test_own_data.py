"""The user's own files: kinds, columns, splits and formats."""

import json

import pytest

from leanformers.tasks import task
from leanformers.tasks.text import TextClassification, TextRegression

from .tiny import sentences

ROWS = sentences(120)


def texts(made, split):
    return {row["text"] for row in made.splits[split]}


def test_columns_tell_the_kind(csv, labelled):
    made = task(labelled)
    assert isinstance(made, TextClassification) and made.labels == ["neg", "pos"] and made.metric == "accuracy"
    rated = csv(("body", "stars"), [(t, i / 10) for i, (t, _) in enumerate(ROWS)], "rated.csv")
    made = task(rated, text="body", label="stars")
    assert isinstance(made, TextRegression) and made.metric == "spearman"
    pairs = csv(("q", "a"), [(t[:9], t) for t, _ in ROWS], "pairs.csv")
    made = task(pairs, query="q", body="a")
    assert made.kind == "embedding" and made.metric == "ndcg@10" and made.needs_teacher
    alone = task(pairs, text="a", kind="embedding")
    assert alone.metric == "neighbours@10"
    for kind in ("causal-lm", "masked-lm"):
        assert task(pairs, text="a", kind=kind).kind == kind


def test_splits_are_disjoint_complete_and_repeatable(labelled):
    made, again = task(labelled), task(labelled)
    assert made.splits == again.splits and made.fingerprint == again.fingerprint
    assert {k: len(v) for k, v in made.splits.items()} == {"train": 96, "validation": 12, "test": 12}
    parts = [texts(made, split) for split in made.splits]
    assert sum(map(len, parts)) == 120 and len(set.union(*parts)) == 120
    for rows in made.splits.values():  # stratified: half of the data is of each class
        assert sum(row["label"] == "pos" for row in rows) * 2 == len(rows)
    other = task(labelled, seed=1)
    assert texts(other, "test") != texts(made, "test") and other.fingerprint != made.fingerprint


def test_size_cuts_training_alone(labelled):
    whole, small = task(labelled), task(labelled, size=10)
    assert small.splits["train"] == whole.splits["train"][:10]
    assert small.splits["test"] == whole.splits["test"]


def test_a_rare_class_stays_in_training(csv):
    path = csv(("text", "label"), [*ROWS, ("a strange one", "odd")])
    made = task(path)
    assert sum(row["label"] == "odd" for row in made.splits["train"]) == 1


def test_own_validation_and_test_are_used(csv, labelled):
    other = csv(("text", "label"), sentences(30, seed=5), "other.csv")
    made = task(labelled, test=other)
    assert texts(made, "test") == {t for t, _ in sentences(30, seed=5)}
    assert len(made.splits["train"]) + len(made.splits["validation"]) == 120
    both = task(labelled, test=other, validation=other)
    assert len(both.splits["train"]) == 120


def test_a_folder_of_splits(tmp_path, csv):
    csv(("text", "label"), sentences(40, seed=1), "train.csv")
    csv(("text", "label"), sentences(20, seed=2), "dev.csv")
    csv(("text", "label"), sentences(10, seed=3), "test.csv")
    made = task(tmp_path)
    assert {k: len(v) for k, v in made.splits.items()} == {"train": 40, "validation": 20, "test": 10}


def test_labels_are_in_a_natural_order(csv):
    path = csv(("text", "label"), [(t, (2, 10, 1)[i % 3]) for i, (t, _) in enumerate(ROWS)])
    made = task(path)
    assert made.labels == ["1", "2", "10"] and made.kind == "text-classification"


def test_na_is_a_label_like_any_other(csv):
    path = csv(("text", "label"), [(t, "NA" if y == "pos" else "null") for t, y in ROWS])
    assert task(path).labels == ["NA", "null"]


def test_every_format_gives_the_same_task(tmp_path, labelled):
    rows = [{"text": t, "label": y} for t, y in ROWS]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "data.tsv").write_text("\ufefftext\tlabel\r\n" + "".join(f"{t}\t{y}\r\n" for t, y in ROWS))
    (tmp_path / "semi.csv").write_bytes(("text;label\n" + "".join(f"{t} é;{y}\n" for t, y in ROWS)).encode("cp1252"))
    made = [task(labelled)] + [task(tmp_path / f"data.{suffix}") for suffix in ("jsonl", "json", "tsv")]
    assert len({m.fingerprint for m in made}) == 1
    semi = task(tmp_path / "semi.csv", delimiter=";", encoding="cp1252")
    assert all(text.endswith(" é") for text in texts(semi, "train"))


def test_parquet_and_datasets_folders(tmp_path, labelled):
    datasets = pytest.importorskip("datasets")
    rows = {"text": [t for t, _ in ROWS], "label": [y for _, y in ROWS]}
    plain = datasets.Dataset.from_dict(rows)
    plain.to_parquet(tmp_path / "data.parquet")
    numbered = plain.cast_column("label", datasets.ClassLabel(names=["pos", "neg"]))
    numbered.save_to_disk(tmp_path / "disk")
    parts = datasets.DatasetDict({"train": numbered.select(range(100)), "test": numbered.select(range(100, 120))})
    parts.save_to_disk(tmp_path / "parts")
    assert task(tmp_path / "data.parquet").fingerprint == task(labelled).fingerprint
    disk = task(tmp_path / "disk")
    assert disk.labels == ["pos", "neg"]  # the order of the data set's own numbers
    assert texts(disk, "test") == texts(task(labelled), "test")
    assert len(task(tmp_path / "parts").splits["test"]) == 20


def test_long_and_quoted_fields(tmp_path):
    long = "word " * 40_000
    lines = "".join(f'"{t}, ""quoted""\nnext line",{y}\n' for t, y in ROWS)
    (tmp_path / "d.csv").write_text(f"text,label\n{long},pos\n{lines}")
    made = task(tmp_path / "d.csv")
    everything = set.union(*(texts(made, split) for split in made.splits))
    assert long.strip() in everything and f'{ROWS[0][0]}, "quoted"\nnext line' in everything


def test_dropping_empty_rows(csv):
    path = csv(("text", "label"), [*ROWS, ("", "pos"), ("good", ""), ("  ", "neg")])
    assert sum(map(len, task(path, drop_empty=True).splits.values())) == 120


def test_source_and_options_are_remembered(labelled):
    made = task(labelled, max_length=32, name="mine", test=labelled)
    assert made.name == "mine" and made.source == str(labelled)
    assert json.loads(json.dumps(made.describe()))["options"] == {
        "max_length": 32,
        "name": "mine",
        "test": str(labelled),
    }
