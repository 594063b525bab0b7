"""The contract of a method: settings, needs, registry, subject."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Literal

import pytest

from leanformers.errors import LeanError
from leanformers.methods import (
    Budget,
    Choice,
    Range,
    Subject,
    base,
    build,
    get,
    method,
    methods,
    setting,
    slugs,
)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(base, "_registry", dict(base._registry))
    monkeypatch.setattr("leanformers.methods._registry", base._registry)

    @method("shrink", stage="structure", needs=("text",), suits={"kinds": ("text-classification",)})
    @dataclass(frozen=True, kw_only=True)
    class Shrink:
        """Make it smaller.

        Second paragraph.
        """

        share: float = setting(0.5, low=0.0, high=1.0, help="what is kept")
        solver: Literal["svd", "nmf"] = "svd"
        layers: tuple[int, ...] | None = None
        steps: int = 3
        schedule: dict[str, float] = field(default_factory=dict)

        def __call__(self, subject):
            subject.notes["share"] = self.share

        def refuses(self, anatomy, task):
            return "it has no layers" if self.layers == () else None

        @classmethod
        def space(cls):
            return {"share": Range(0.1, 0.9), "solver": Choice(["svd", "nmf"])}

    return Shrink


def test_settings_are_read_and_converted(registry):
    made = build({"method": "shrink", "share": 1, "layers": [0, 2], "solver": "nmf"})
    assert made == registry(share=1.0, layers=(0, 2), solver="nmf")
    assert isinstance(made.share, float)
    info = get("shrink")
    assert info.title == "Make it smaller"
    assert [entry.name for entry in info.settings] == ["share", "solver", "layers", "steps", "schedule"]
    assert info.settings[0].help == "what is kept" and info.settings[1].choices == ("svd", "nmf")
    assert info.space()["share"] == Range(0.1, 0.9) and info.starts() == [{}]


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"method": "shrnk"}, ["no method 'shrnk'", "did you mean 'shrink'"]),
        ({"method": "shrink", "shar": 0.1}, ["no setting 'shar'", "did you mean 'share'", "solver"]),
        ({"method": "shrink", "share": 1.5}, ["'share'", "from 0.0 to 1.0", "1.5"]),
        ({"method": "shrink", "share": "half"}, ["'share'", "a number", "'half'"]),
        ({"method": "shrink", "share": True}, ["'share'", "True"]),
        ({"method": "shrink", "share": float("nan")}, ["'share'"]),
        ({"method": "shrink", "steps": 2.5}, ["'steps'", "a whole number"]),
        ({"method": "shrink", "solver": "qr"}, ["'solver'", "'svd', 'nmf'"]),
        ({"method": "shrink", "layers": "0,1"}, ["'layers'", "a list of whole numbers or null"]),
        ({"method": "shrink", "layers": [0, "x"]}, ["'layers'"]),
        ({"share": 0.5}, ["'method'"]),
        ("shrink", ["mapping"]),
    ],
)
def test_bad_steps_are_refused_in_one_sentence(step, words):
    with pytest.raises(LeanError) as caught:
        build(step)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_own_checks_of_a_method_become_lean_errors():
    @method("picky")
    @dataclass(frozen=True, kw_only=True)
    class Picky:
        low: int = 1
        high: int = 2
        must: str = setting()

        def __post_init__(self):
            if self.low > self.high:
                raise ValueError("low is above high")

        def __call__(self, subject): ...

    with pytest.raises(LeanError, match="'picky' needs a value for its setting 'must'"):
        build({"method": "picky"})
    with pytest.raises(LeanError, match="'picky': low is above high"):
        build({"method": "picky", "low": 3, "must": "x"})
    assert get("picky").title == "picky"


def test_needs_and_suits_are_checked_before_work():
    info = get("shrink")
    with pytest.raises(LeanError, match=r"'shrink' needs training texts; give a task"):
        info.check(Subject(model=None))
    with pytest.raises(LeanError, match="does not suit causal-lm tasks"):
        get("shrink").check(subject_of("causal-lm"))
    info.check(subject_of("text-classification"))
    with pytest.raises(LeanError, match="does not suit this model: it has no layers"):
        info.check(subject_of("text-classification"), {"layers": []})
    anatomy = SimpleNamespace(family=SimpleNamespace(name="bert"), layers=())

    @method("only-llama", suits={"families": ("llama",)})
    @dataclass(frozen=True)
    class OnlyLlama:
        def __call__(self, subject): ...

    assert "does not suit the family bert" in get("only-llama").unsuitable(anatomy)


def test_a_package_that_is_not_installed_is_a_need(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torchao" else real(name))
    assert get("quantization").missing(Subject(model=None)).endswith("pip install 'leanformers[quant]'")


def test_what_cannot_suit_the_task_is_refused_before_the_first_step():
    from leanformers.execute import execute

    steps = [{"method": "drop-layers"}, {"method": "lazyllm"}]  # the first edits, so the second meets another model
    with pytest.raises(LeanError, match="'lazyllm' does not suit text-classification tasks"):
        execute(steps, subject_of("text-classification"))


class Anatomised(Subject):
    anatomy = SimpleNamespace(family=SimpleNamespace(name="bert"), layers=())


def subject_of(kind):
    return Anatomised(model=None, task=SimpleNamespace(kind=kind))


def test_declarations_are_checked():
    with pytest.raises(ValueError, match="stage 'later'"):
        method("x", stage="later")
    with pytest.raises(ValueError, match="needs"):
        method("x", needs=("money",))
    with pytest.raises(TypeError, match="frozen dataclass"):
        method("x")(type("Plain", (), {}))


def test_every_method_file_registers_its_own_slug():
    found = methods()
    assert list(found) and set(found) == set(slugs())
    for info in found.values():
        assert info.paper or info.cls.__module__ == __name__ or info.stage == "prepare", info.slug
        assert set(info.space()) <= {entry.name for entry in info.settings}, info.slug
        for settings in info.starts():
            info.build(settings)


def test_budget_shortens_training(monkeypatch):
    calls = []

    def fit(model, task, tokenizer, **options):
        calls.append(options)
        return SimpleNamespace(seconds=2.0, loss=0.1, steps=1)

    monkeypatch.setitem(sys.modules, "leanformers.training", SimpleNamespace(fit=fit))
    task = SimpleNamespace(splits={"train": [{}] * 1000})
    subject = Subject(model=None, task=task, budget=Budget(examples=100, epochs=0.5), seed=7)
    subject.train(epochs=3, learning_rate=1e-4, limit=800)
    assert calls[0]["epochs"] == 0.5 and calls[0]["limit"] == 100 and calls[0]["seed"] == 7
    assert subject.trained_examples == 50 and subject.full_examples == 2400 and subject.trained_seconds == 2.0
    with pytest.raises(LeanError, match="teacher"):
        subject.train(epochs=1, learning_rate=1e-4, distillation=object())
    subject.budget = Budget(examples=0)
    assert subject.train(epochs=1, learning_rate=1e-4) is None and len(calls) == 1
    full = Subject(model=None, task=task)
    full.train(epochs=2, learning_rate=1e-4)
    assert calls[1]["epochs"] == 2 and calls[1]["limit"] is None and full.trained_examples == 2000


def test_names_are_known_without_importing_method_files_or_torch():
    code = (
        "import sys; import leanformers.methods as m; m.slugs(); m.base.setting;"
        "heavy = [n for n in ('torch', 'optuna', 'transformers') if n in sys.modules]; sys.exit(bool(heavy))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
