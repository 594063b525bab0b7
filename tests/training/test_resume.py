"""A training that was killed goes on and ends at the same bits; a finished one is loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from leanformers.errors import LeanError
from leanformers.training import Distillation, Teacher, fit

OPTIONS: dict[str, Any] = {
    "epochs": 2.5,
    "learning_rate": 1e-3,
    "checkpoint_seconds": 0.0,
    "batch_size": 16,
    "dropout": None,  # the model's own: random numbers must go on too
    "progress": False,
}


class Stop:
    """Interrupt after some steps, as Ctrl-C would."""

    def __init__(self, at: int) -> None:
        self.at = at

    def after_step(self, model: Any, step: int, total: int) -> None:
        if step == self.at:
            raise KeyboardInterrupt


def same(a: Any, b: Any) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


# 6 steps an epoch: within one, at its end, after it.
@pytest.mark.parametrize(("at", "distilled"), [(1, False), (6, False), (7, True), (14, False)])
def test_an_interrupted_training_ends_at_the_same_bits(
    at: int,
    distilled: bool,
    bert: Callable[..., Any],
    sentiment: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    task = sentiment()
    options = OPTIONS | {"freeze": ("embeddings",) if at == 7 else ()}
    if distilled:
        teacher = Teacher(bert(width=32), task, tokenizer)
        options |= {
            "teacher": teacher,
            "distillation": Distillation(hidden=1.0, relation=1.0, relation_heads=2),
        }
    whole, model, again = bert(), bert(), bert()
    expected = fit(whole, task, tokenizer, **options)
    with pytest.raises(KeyboardInterrupt):
        fit(model, task, tokenizer, output_dir=tmp_path, callbacks=[Stop(at)], **options)
    result = fit(again, task, tokenizer, output_dir=tmp_path, **options)
    assert same(again, whole)
    assert result.steps == expected.steps == 15 and result.loss == pytest.approx(expected.loss, rel=1e-4)


def test_a_finished_training_is_loaded(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    first, second = bert(), bert()
    one = fit(first, sentiment(), tokenizer, output_dir=tmp_path, **OPTIONS)
    kept = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert kept == ["complete", "learned.safetensors", "trainer_state.json", "training.json"]
    two = fit(second, sentiment(), tokenizer, output_dir=tmp_path, **OPTIONS)
    assert same(first, second) and (one.loss, one.steps) == (two.loss, two.steps) and two.seconds < one.seconds


def test_an_unfinished_checkpoint_is_passed_over(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    whole, model, again = bert(), bert(), bert()
    fit(whole, sentiment(), tokenizer, **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        fit(model, sentiment(), tokenizer, output_dir=tmp_path, callbacks=[Stop(5)], **OPTIONS)
    partial = tmp_path / "checkpoint-9"
    partial.mkdir()
    (partial / "learned.safetensors").write_bytes(b"half")
    fit(again, sentiment(), tokenizer, output_dir=tmp_path, **OPTIONS)
    assert same(again, whole) and not partial.exists()


def test_a_folder_of_another_training_is_refused(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    fit(bert(), sentiment(), tokenizer, output_dir=tmp_path, **OPTIONS)
    with pytest.raises(LeanError, match="learning_rate"):
        fit(bert(), sentiment(), tokenizer, output_dir=tmp_path, **(OPTIONS | {"learning_rate": 1e-4}))
    with pytest.raises(LeanError, match="model"):
        fit(bert(seed=1), sentiment(), tokenizer, output_dir=tmp_path, **OPTIONS)
    with pytest.raises(LeanError, match="task"):
        fit(bert(), sentiment(90), tokenizer, output_dir=tmp_path, **OPTIONS)
    (tmp_path / "file").touch()
    with pytest.raises(LeanError, match="output_dir"):
        fit(bert(), sentiment(), tokenizer, output_dir=tmp_path / "file", **OPTIONS)


def test_a_full_disk_is_said_in_a_sentence(
    bert: Callable[..., Any],
    sentiment: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from leanformers.training import trainer

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "save_file", full)
    with pytest.raises(LeanError, match="No space left"):
        fit(bert(), sentiment(), tokenizer, output_dir=tmp_path, **OPTIONS)
    assert not list(tmp_path.glob("checkpoint-*"))


SCRIPT = """
import sys, time
import torch

sys.path.insert(0, {here!r})
import conftest
from leanformers.training import fit

torch.set_num_threads(1)


class Slow:
    def after_step(self, model, step, total):
        time.sleep({pause})


model, task, tokenizer = conftest.make_bert(), conftest.make_sentiment(), conftest.make_tokenizer(conftest.WORDS)
fit(model, task, tokenizer, output_dir={folder!r}, callbacks=[Slow()], **{options!r})
torch.save(model.state_dict(), {out!r})
"""


@pytest.mark.slow
def test_kill_9_at_any_moment(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    """Killed in the middle, started again: the weights of a run that was left alone."""
    folder, out = tmp_path / "run", tmp_path / "weights.pt"

    def start(pause: float) -> subprocess.Popen[bytes]:
        here = str(Path(__file__).parent)
        code = SCRIPT.format(here=here, folder=str(folder), out=str(out), pause=pause, options=OPTIONS)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        return subprocess.Popen([sys.executable, "-c", code], env=env)

    killed = start(0.3)
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoint-*/complete")) and time.monotonic() < deadline:
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not out.exists()
    assert start(0.0).wait(timeout=120) == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = bert()
        fit(alone, sentiment(), tokenizer, **OPTIONS)
    finally:
        torch.set_num_threads(threads)
    resumed = torch.load(out, weights_only=True)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in alone.state_dict().items())
