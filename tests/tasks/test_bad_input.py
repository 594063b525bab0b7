"""Everything wrong with the data is one sentence that names the place and the remedy."""

import json

import pytest

from leanformers.errors import LeanError
from leanformers.tasks import task

from .tiny import sentences

ROWS = sentences(60)


def refused(*args, **options) -> str:
    with pytest.raises(LeanError) as caught:
        task(*args, **options)
    said = str(caught.value)
    assert "\n" not in said and said.endswith((".", ")")) and len(said) < 500, said
    return said


def test_missing_file(tmp_path):
    assert "There is no file" in refused(tmp_path / "nothing.csv")
    assert "There is no file nothing.csv" in refused("nothing.csv")
    assert "did you mean 'sentiment'" in refused("sentimant")
    assert "holds no data" in refused(tmp_path)


def test_missing_column(csv):
    path = csv(("headline", "topic"), ROWS)
    assert "no column 'text' for text; its columns are headline, topic" in refused(path, label="topic")
    assert "no column 'class' for label; its columns are headline, topic" in refused(
        path, text="headline", label="class"
    )
    assert "no label column" in refused(path, text="headline")
    assert "give query= and body=" in refused(path, query="headline")
    assert "takes no label column" in refused(path, text="headline", label="topic", kind="causal-lm")
    other = csv(("headline", "subject"), ROWS, "test.csv")
    assert "test.csv has no column 'topic'" in refused(path, text="headline", label="topic", test=other)


def test_one_class(csv):
    assert "one class only ('pos')" in refused(csv(("text", "label"), [(t, "pos") for t, _ in ROWS]))


def test_empty_rows(csv):
    path = csv(("text", "label"), [*ROWS[:4], ("", "pos"), *ROWS[4:], ("bad", "")])
    said = refused(path)
    assert "2 rows with an empty value (first: row 5, column 'text')" in said and "--drop-empty" in said
    assert "no rows" in refused(csv(("text", "label"), [], "none.csv"))
    (path.parent / "empty.csv").write_text("")
    assert "is empty" in refused(path.parent / "empty.csv")


def test_unseen_label(csv, labelled):
    other = csv(("text", "label"), [*ROWS, ("so so", "meh")], "test.csv")
    said = refused(labelled, test=other)
    assert "test.csv: the label 'meh'" in said and "does not occur in the training rows" in said


def test_not_utf8(csv):
    path = csv(("text", "label"), [("abcé", "pos"), *ROWS], encoding="latin-1")
    said = refused(path)
    assert "is not UTF-8: byte 0xe9 at position 14" in said and "--encoding" in said
    assert path.read_bytes()[14] == 0xE9
    assert "no encoding 'utf-99'" in refused(path, encoding="utf-99")


def test_too_few_rows(csv):
    assert "has 6 rows; at least 20" in refused(csv(("text", "label"), ROWS[:6]))


def test_labels_that_are_no_classes(csv):
    path = csv(("text", "id"), [(t, f"id{i}") for i, (t, _) in enumerate(ROWS)])
    assert "60 different values in 60 rows" in refused(path, label="id")
    assert "row 1: 'id0' in column 'id' is no number" in refused(path, label="id", kind="text-regression")


def test_broken_files(tmp_path):
    def write(name, content):
        (tmp_path / name).write_text(content) if isinstance(content, str) else (tmp_path / name).write_bytes(content)
        return tmp_path / name

    good = json.dumps({"text": "good", "label": "pos"})
    assert "row 2 (line 3) has 3 fields where the header has 2" in refused(
        write("a.csv", "text,label\ngood,pos\ngood, really,pos\n")
    )
    assert "check the quotes" in refused(write("b.csv", 'text,label\n"good"x,pos\n'))
    assert "two columns named 'text'" in refused(write("c.csv", "text,text\na,b\n"))
    assert "c.jsonl, line 2 is not JSON" in refused(write("c.jsonl", f"{good}\n{{oops\n"))
    assert "must hold JSON objects" in refused(write("d.jsonl", "[1, 2]\n"))
    assert "row 1: column 'text' holds a list, not text" in refused(write("e.jsonl", '{"text": ["a"], "label": "b"}'))
    assert "not a readable Parquet file" in refused(write("f.parquet", b"PAR1 nonsense"))
    assert "none of .csv" in refused(write("g.xlsx", b"PK"))


def test_wrong_options(labelled):
    assert "no option 'colour'; it has kind, text" in refused(labelled, colour="red")
    assert "no kind of task 'ner'" in refused(labelled, kind="ner")
    assert "max_length is 2" in refused(labelled, max_length=2)
    assert "size is 1" in refused(labelled, size=1)
    assert "objective is 'pears'" in refused(labelled, kind="embedding", objective="pears")
    assert "needs pairs" in refused(labelled, kind="embedding", metric="ndcg@10")
    assert "not a int" in refused(3)


def test_a_hub_name_without_network(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*_):
        raise ConnectionError("Couldn't reach the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    said = refused("someone/something")
    assert "someone/something" in said and "Couldn't reach the Hub" in said
