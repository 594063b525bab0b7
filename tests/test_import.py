"""Importing is cheap, the public names are there, and a lean folder needs no more than the import."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "optuna",
    "plotly",
    "sklearn",
    "peft",
    "torchao",
    "pandas",
    "jinja2",
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def fastest(codes: list[list[str]], rounds: int = 4) -> list[float]:
    """The shortest wall time of each command, run in turns."""
    best = [float("inf")] * len(codes)
    for _ in range(rounds):
        for place, code in enumerate(codes):
            start = time.perf_counter()
            subprocess.run([sys.executable, *code], check=True, capture_output=True, timeout=120)
            best[place] = min(best[place], time.perf_counter() - start)
    return best


def test_import_loads_nothing_heavy():
    loaded = run(f"import leanformers, sys; print([name for name in {HEAVY} if name in sys.modules])")
    assert loaded == "[]"


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom leanformers.cli import app\n"
        "for command in ([], ['slim'], ['apply'], ['measure'], ['methods'], ['advise']):\n"
        "    assert CliRunner().invoke(app, [*command, '--help']).exit_code == 0, command\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert run(code) == "[]"


@pytest.mark.alone
def test_import_costs_no_more_than_transformers():
    codes = ("import leanformers", "import leanformers, transformers", "import transformers")
    ours, both, theirs = fastest([["-c", code] for code in codes])
    assert ours <= 1.2 * theirs
    assert both <= 1.2 * theirs


@pytest.mark.alone
def test_help_within_a_second():
    (seconds,) = fastest([["-m", "leanformers.cli", "--help"]])
    assert seconds < 1.0


def test_public_names_are_there():
    import leanformers

    for name in leanformers.__all__:
        assert getattr(leanformers, name) is not None, name
    assert set(leanformers.__all__) <= set(dir(leanformers))
    assert not {"sys", "importlib", "Any"} & set(dir(leanformers))  # what a completion would offer
    assert all(hasattr(leanformers, name) for name in dir(leanformers))


def test_unknown_name():
    import leanformers

    with pytest.raises(AttributeError, match="nonsense"):
        _ = leanformers.nonsense


@pytest.mark.parametrize("first", ["import leanformers.methods", "from leanformers.methods import get", "pass"])
def test_a_room_named_like_its_function_is_both(first):
    code = (
        f"{first}\nimport leanformers as lean\n"
        "assert lean.methods() == lean.methods.methods() and callable(lean.methods.get)\n"
        "from leanformers import methods\nassert methods is lean.methods\nprint('fine')"
    )
    assert run(code) == "fine"


def test_the_import_registers_whichever_comes_first():
    check = (
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known\n"
        "print('leanformers' in known)"
    )
    assert run(f"import leanformers, transformers\n{check}") == "True"
    assert run(f"import transformers, leanformers\n{check}") == "True"
    assert run(f"from transformers.quantizers import auto\nimport leanformers\n{check}") == "True"
