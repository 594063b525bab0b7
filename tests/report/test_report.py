"""The report and the picture: complete, escaped, self-contained, honest about what is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from sample import sample

from leanformers.errors import LeanError
from leanformers.report import picture, render, view, write, write_picture
from leanformers.report import quantities as q
from leanformers.report.zeros import zeros

VOID = {"meta", "input", "br", "link", "img", "hr"}


class Checked(HTMLParser):
    """Every tag is closed in its order; collects tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def plotted(page: str) -> dict:
    return json.loads(re.search(r'id="plot-data">(.*?)</script>', page, re.S)[1])


def test_page_is_well_formed_and_fetches_nothing():
    page = render(sample())
    checked = Checked(page)
    for _, attributes in checked.tags:
        for name in ("src", "href", "action", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith("#"), attributes
    assert not re.search(r"""url\(|@import|fetch\(|XMLHttpRequest|https?://(?!www\.w3\.org/2000/svg)""", page)
    assert "default-src 'none'" in page


def test_page_says_everything():
    data = sample()
    text = Checked(render(data, "runs/demo")).text
    for point in data["points"]:
        assert point["name"] in text
    for wanted in (
        "latency ≤ 0.6× reached by 3", "bytes ≤ 0.3× reached by 2", "int4 weight-only does not run on this CPU",
        "A made-up processor", "avx2", "25.0 GB", "it does not suit text-classification tasks", "torch 2.13.0", "TF-IDF", "0.869", "90.9 MB", "22.7 M", "stock", "lean",
        "import leanformers, transformers", "'runs/demo/points/idt5+optin-p1'", "scheme: int8_weight_only",
        "B is at least as good on every measure", "8 min 31 s", "leanformers slim --model minilm",
    ):  # fmt: skip
        assert wanted in text, wanted


def test_plot_holds_every_measured_point():
    data = sample()
    entries = plotted(render(data))
    names = {entry["name"] for entry in entries["points"]}
    measured = {point["name"] for point in data["points"] if point["measurement"]}
    assert names == measured | {"baseline", "TF-IDF"}
    assert [axis["key"] for axis in entries["axes"]][:3] == ["quality", "latency", "bytes"]
    assert {goal["key"] for goal in entries["goals"]} == {"latency", "bytes", "quality"}
    frontier = [entry for entry in entries["points"] if entry["status"] == "frontier"]
    assert [entry["label"] for entry in frontier] == ["A", "B", "C", "D"]
    assert all(entry["steps"] for entry in frontier)


def test_text_is_escaped():
    data = sample()
    evil = "</script><img src=x onerror=alert(1)>&\"'"
    data["model"] = data["name"] = data["task"]["name"] = data["command"] = evil
    data["points"][0] |= {
        "name": evil,
        "reason": evil,
        "recipe": {"steps": [{"method": evil, "setting": evil}]},
    }
    data["references"][0]["name"] = data["environment"]["hardware"]["cpu"] = evil
    page = render(data)
    assert "<img" not in page
    assert page.count("</script>") == 2
    Checked(page)
    assert "<img" not in picture(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(points=[]),
        lambda d: d.update(references=[]),
        lambda d: d.update(goals=[]),
        lambda d: d.update(best=None),
        lambda d: d.update(environment={}),
        lambda d: [d.pop(key) for key in ("seed", "seconds", "created", "command", "best", "goals", "references")],
        lambda d: [point.update(status="failed", measurement=None, ratios={}) for point in d["points"]],
        lambda d: [point["measurement"].pop("latency") for point in d["points"] if point["measurement"]],
        lambda d: d["baseline"].update(measurement=None),
        lambda d: [point["measurement"].update(quality=0.8) for point in d["points"] if point["measurement"]],
        lambda d: d["task"].update(metric="bits_per_byte", better="lower"),
        lambda d: d.update(status="interrupted"),
    ],
)  # fmt: skip
def test_what_is_missing_is_left_out(change):
    data = sample()
    change(data)
    Checked(render(data))
    assert picture(data).startswith("<svg")


@pytest.mark.parametrize(
    ("steps", "who"),
    [
        ([{"method": "obert", "sparsity": 0.5}], "obert"),
        ([{"method": "essential-sparsity", "pattern": "2:4"}, {"method": "lora"}], "essential-sparsity"),
        ([{"method": "obert"}, {"method": "essential-sparsity"}], "essential-sparsity and obert"),
        ([{"method": "slicegpt"}, {"method": "axformer"}, {"method": "unheard-of"}], None),
        ([], None),
    ],
)
def test_zeros_that_save_nothing_are_said_in_words(steps, who):
    assert zeros(steps).startswith(f"The weights that {who} set to zero save no bytes and no time") == (who is not None)
    data = sample()
    lost = sum(bool(zeros(view.steps(point))) for point in view.losers(data))
    assert lost == 1  # the sample's essential-sparsity
    data["points"][0]["recipe"]["steps"] = steps
    text = Checked(render(data)).text
    here = 2 if who else 0  # under the table, and in its details
    assert text.count("save no bytes and no time") == lost + here
    assert "bytes on disk: of the weight files, as du shows them" in text


def test_model_card_says_in_words_that_zeros_save_nothing_and_what_llama_cpp_may_do():
    from types import SimpleNamespace

    from leanformers.frontier.card import model_card
    from leanformers.measure import Measurement
    from leanformers.recipe import Recipe

    def card(*steps, runtime="torch"):
        recipe = Recipe(model="minilm", task="sentiment", steps=steps)
        measured = Measurement(parameters=10, bytes=40, memory=40, runtime=runtime)
        point = SimpleNamespace(name="p", tier="lean", recipe=recipe, measurement=measured, ratios={})
        return model_card(point, {"name": "sentiment"}, ["import leanformers"])

    masked, cut = card({"method": "obert", "sparsity": 0.5}), card({"method": "drop-layers", "keep": 0.5})
    assert "The weights that obert set to zero save no bytes and no time" in masked
    assert "zero" not in cut
    assert "CFLAGS=-mno-amx-int8" in card(runtime="llama.cpp-q8_0") and "AMX" not in cut


def test_interruption_is_said():
    data = sample() | {"status": "interrupted"}
    assert "interrupted" in Checked(render(data)).text


def test_a_search_without_time_for_a_recipe_says_how_to_go_on():
    data = sample() | {"points": [], "seconds": 349}
    assert view.headline(data).startswith("No recipe has been tried yet (5 min 49 s went into the baseline): the same")
    assert "No recipe" not in view.headline(sample())


def test_a_search_whose_time_ended_before_a_full_run_does_not_call_the_model_unbeaten():
    data = sample()
    estimates = [point for point in data["points"] if point["status"] == "estimated"]
    told = view.headline(data | {"points": estimates})
    assert "by estimates alone" in told and "none beats" not in told and told.endswith("goes on from here.")
    failed = [point for point in data["points"] if point["status"] == "failed"]
    assert "none beats the model as it is" in view.headline(data | {"points": failed})


def test_goals_that_no_point_reaches_together_are_said():
    data = sample() | {"goals": ["latency<=0.4x", "quality>=0.99x"], "best": "idt5+optin-p1"}
    for point in data["points"]:
        point["meets"] = False
    text = Checked(render(data)).text
    assert "no point reaches them all" in text and "closest to the goals" in text
    text = Checked(render(sample())).text
    assert "no point reaches them all" not in text and "best for the goals" in text


def test_a_goal_that_the_baseline_meets_is_not_called_missed():
    data = sample() | {"points": [], "goals": ["quality>=0.98x", "latency<=0.5x"]}
    quality, latency = view.goal_limits(data)
    assert quality["base"] and not quality["met"] and not latency["base"]
    text = Checked(render(data)).text
    assert "quality ≥ 0.98× by the baseline alone" in text and "latency ≤ 0.5× not reached" in text


def test_a_reference_that_beats_the_model_is_said():
    data = sample()
    assert "is a transformer needed" not in view.headline(data)
    data["references"][0]["ratios"]["quality"] = 1.01
    assert "TF-IDF does better than the model itself" in view.headline(data)


def test_newer_schema_is_refused():
    with pytest.raises(LeanError, match="schema 2"):
        render(sample() | {"schema": 2})


def test_write_replaces_whole(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write(sample(), path) == path
    assert path.read_text("utf-8").startswith("<!doctype html>")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_picture_follows_the_reader(tmp_path):
    text = write_picture(sample(), tmp_path / "frontier.svg").read_text("utf-8")
    assert "prefers-color-scheme:dark" in text and text.count('class="frontier"') == 4
    for wanted in (
        "TF-IDF",
        "baseline",
        "A  0.78×",
        "idt5 + optin + distillation + quantization",
        "accuracy",
    ):
        assert wanted in text
    with pytest.raises(LeanError, match="no axis 'nonsense'"):
        write_picture(sample(), tmp_path / "frontier.svg", x="nonsense")


def test_goal_limits_of_a_metric_where_less_is_better():
    data = sample() | {"goals": ["quality>=0.8x", "bytes<=20MB"]}
    data["task"] |= {"metric": "bits_per_byte", "better": "lower"}
    quality, size = view.goal_limits(data)
    assert quality["limit"] == pytest.approx(0.869 / 0.8)
    assert size == {"text": "bytes ≤ 20 MB", "key": "bytes", "limit": 20e6, "met": 2, "base": False}


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("latency", 0.0412, "41.2 ms"), ("latency", 1.5, "1.50 s"), ("latency", 2e-5, "20.0 µs"), ("latency", 0, "0 ms"),
        ("latency", 250, "4 min 10 s"), ("latency", 3900, "1 h 5 min"), ("bytes", 90_900_000, "90.9 MB"),
        ("bytes", 999_600, "1.00 MB"), ("bytes", 12, "12 B"), ("parameters", 22_713_986, "22.7 M"),
        ("parameters", 950, "950"), ("flops", 21.5e6, "21.5 M"), ("quality", 0.8694, "0.869"),
        ("throughput", 14_200, "14.2 k tokens/s"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(key, value, text):
    assert q.QUANTITIES[key].write(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.544, "0.54×"), (1.0, "1.00×"), (0.0213, "0.021×"), (0, "0.00×")])
def test_ratio(value, text):
    assert q.ratio(value) == text


def test_staircase_and_ticks():
    from leanformers.report.picture import staircase, ticks

    points = [(1, 0.5, "a"), (2, 0.8, "b"), (3, 0.7, "c"), (4, 0.9, "d"), (2, 0.6, "e")]
    assert [name for *_, name in staircase(points, (1, -1))] == ["a", "b", "d"]
    assert ticks(0, 45, 7) == [0, 10, 20, 30, 40]
    assert ticks(0.74, 0.88, 6) == [0.75, 0.8, 0.85]
