"""Evidence: computed verdicts, the file's exact form, and tables that say what the files say."""

from __future__ import annotations

import json
import math

import pytest

import evidence_table
from claim import Evidence
from leanformers import evidence
from leanformers.methods import slugs


@pytest.fixture
def made(tmp_path):
    e = Evidence(
        "greenformers",
        claim="Half the rank keeps 98% <b>",
        paper="A | B (2021)",
        seeds=[0, 1],
        folder=tmp_path,
    )
    e.baseline = {"accuracy": 0.86}
    e.result = {"accuracy": 0.85, "note": "x"}
    return e


def test_tables_say_what_the_files_say():
    stale = [path.name for path, page in evidence_table.pages().items() if path.read_text("utf-8") != page]
    assert stale == [], "run make evidence-table"


def test_every_result_is_complete_and_of_a_known_form(root):
    for path in sorted((root / "evidence" / "results").glob("*.json")):
        result = json.loads(path.read_text("utf-8"))
        assert result["slug"] == path.stem
        assert set(evidence.FIELDS) <= set(result) <= {*evidence.FIELDS, "cause"}
        scripts = [script.stem.replace("_", "-") for script in (root / "evidence").glob("*.py")]
        assert any(path.stem.startswith(stem) for stem in scripts), path.name
        assert result["checks"]
        for check in result["checks"]:
            assert set(check) == {"name", "required", "measured", "holds"}
            assert isinstance(check["holds"], bool)


def test_no_script_writes_a_verdict_by_hand(root):
    for path in (root / "evidence").glob("*.py"):
        if path.name != "claim.py":
            assert '"holds"' not in path.read_text("utf-8"), path.name


def test_file_has_the_exact_form(made, tmp_path):
    made.check("share of the accuracy", 0.85 / 0.86, ">= 0.98")
    made.check("latency", 0.7, "<= 0.6")
    path = made.write()
    result = json.loads(path.read_text("utf-8"))
    assert list(result) == [
        "slug", "claim", "paper", "checks", "baseline", "result", "seeds", "seconds", "hardware", "versions", "commit",
    ]  # fmt: skip
    assert [check["holds"] for check in result["checks"]] == [True, False]
    assert result["checks"][0] == {
        "name": "share of the accuracy", "required": ">= 0.98", "measured": pytest.approx(0.988, abs=1e-3), "holds": True,
    }  # fmt: skip
    assert result["seeds"] == [0, 1] and result["hardware"]["cpu"] and result["versions"]["torch"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["greenformers.json"]
    assert not made.holds


@pytest.mark.parametrize(
    ("measured", "required", "holds"),
    [
        (1, ">= 1", True), (1.0, "> 1", False), (0.5, "<= 0.6", True), (3, "== 3", True), (math.nan, ">= 0", False),
        (math.inf, ">= 0", False), (None, "<= 1", False), (-1e-3, "< 1e-6", True),
    ],
)  # fmt: skip
def test_verdicts_are_computed(made, measured, required, holds):
    assert made.check("it", measured, required) is holds


def test_functions_need_words(made):
    with pytest.raises(ValueError, match="say in words"):
        made.check("order", [1, 2], lambda v: True)
    assert made.check("order", [1, 2], lambda v: v == sorted(v), "rising")
    assert made.checks[-1].required == "rising"


@pytest.mark.parametrize("required", ["about 1", "0.98", ">= a"])
def test_a_requirement_is_a_sign_and_a_number(made, required):
    with pytest.raises(ValueError, match="no sign and number"):
        made.check("it", 1.0, required)


def test_numbers_of_torch_and_numpy_become_plain(made):
    import numpy as np
    import torch

    made.check("a", np.float32(0.5), ">= 0.5")
    made.check("b", torch.tensor(3), "== 3")
    made.result = {"t": torch.tensor(1.5), "n": np.int64(2), "bad": float("nan")}
    assert made.to_json()["result"] == {"t": 1.5, "n": 2, "bad": None}


def test_nothing_is_written_when_it_breaks(tmp_path):
    with pytest.raises(RuntimeError), Evidence("x", claim="c", paper="p", folder=tmp_path) as e:
        e.check("it", 1, ">= 0")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_checks_are_needed_and_named_once(made):
    with pytest.raises(ValueError, match="checks nothing"):
        made.to_json()
    made.check("it", 1, ">= 0")
    with pytest.raises(ValueError, match="there already"):
        made.check("it", 1, ">= 0")


def test_tables(made):
    made.check("ratio", 0.98837, ">= 0.98")
    made.check("late|ncy", 0.7, "<= 0.6")
    made.cause = "the CPU <has> no VNNI"
    results = {"greenformers": made.to_json()}
    short, long = evidence_table.short_table(results), evidence_table.long_table(results)
    assert "1 of 2 held" in short and "late\\|ncy: 0.7 (required &lt;= 0.6)" in short and "&lt;b>" in short
    assert "| ratio | >= 0.98 | 0.9884 | yes |" in long and "**no**" in long and "no VNNI" in long
    page = evidence_table.replaced(f"before {evidence_table.BEGIN} old {evidence_table.END} after", short)
    assert page.startswith("before ") and page.endswith(" after") and " old " not in page
    assert evidence_table.replaced(page, short) == page
    with pytest.raises(SystemExit):
        evidence_table.replaced("no markers", short)


def test_a_page_for_every_method(tmp_path):
    import method_pages

    written = {path.stem for path in method_pages.write(tmp_path / "methods")}
    assert written == {"index", *slugs()}
    for slug in slugs():
        text = (tmp_path / "methods" / f"{slug}.md").read_text("utf-8")
        assert text.startswith(f"# {slug}\n") and "## Settings" in text and "## Evidence" in text


FOUND = {
    "edits": {"keep_heads": "keep_heads", "mask_weights": "mask_weights", "mask_weights_2_4": "mask_weights"},
    "distances": {
        "openvino": {
            "bert": {"as it is": 1e-6, "keep_heads": 2e-6, "mask_weights": 1e-6, "mask_weights_2_4": 0.5},
            "t5": {"as it is": 1e-6, "keep_heads": None, "mask_weights": 1e-6},
        },
        "llama.cpp": {"qwen3": {"as it is": 0.0, "keep_heads": "layers.1 has 1 heads: <none>"}},
    },
}


def test_which_edits_run_where():
    assert evidence.runs_exactly(["keep_heads"], FOUND) == {"openvino": (1, 1), "llama.cpp": (0, 1)}
    assert evidence.runs_in(["keep_heads"], FOUND) == "openvino, llama.cpp in 0 of 1 families"
    assert evidence.runs_in(["mask_weights"], FOUND) == "openvino in 1 of 2 families"
    assert evidence.runs_in(["keep_heads"], {"distances": {}, "edits": {}}) == ""


def test_the_tables_of_exports():
    import exports_table

    table = exports_table.table(FOUND)
    assert "| family | openvino | llama.cpp |" in table
    assert "| bert | 3 of 4, within 2e-06 | – |" in table and "| qwen3 | – | 1 of 2 |" in table
    assert "| keep heads | 1 of 1 families | 0 of 1 families |" in table
    assert "- openvino, mask weights 2 4 on bert: it answers otherwise, by 0.5." in table
    assert "- llama.cpp, keep heads on qwen3: layers.1 has 1 heads: &lt;none>." in table
    assert exports_table.table({"distances": {}, "edits": {}}) == "No exports have been recorded yet."


def test_a_method_names_its_edits():
    from leanformers.cli.describe import runs_in
    from leanformers.methods import get

    assert get("optin").edits == ("keep_heads", "keep_neurons")
    assert get("lora").edits == () and "makes no edits" in runs_in(get("lora"))
    assert "(keep heads, keep neurons)" in runs_in(get("optin"))
