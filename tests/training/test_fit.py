"""The training path: the same bits for the same seed, honest accumulation, nothing left behind."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from leanformers.errors import LeanError
from leanformers.training import Distillation, Teacher, TrainingDiverged, fit
from leanformers.training.callbacks import cubic, progress_of


def same(a: Any, b: Any) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_it_learns(bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any) -> None:
    task, model = sentiment(200), bert()
    result = fit(model, task, tokenizer, epochs=15, learning_rate=5e-3, batch_size=16, progress=False)
    metrics = task.evaluate(lambda b: task.forward(model, b), tokenizer, "test")
    assert metrics["accuracy"] > 0.9 and result.loss < 0.3
    assert result.steps == 15 * 13 and result.seconds > 0 and 0 <= result.padding < 0.2
    features = task.features(tokenizer, "train")
    assert result.tokens == 15 * sum(len(f["input_ids"]) for f in features)
    assert not model.training


def test_the_same_seed_gives_the_same_bits_whatever_ran_before(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any
) -> None:
    models = [bert(), bert(), bert()]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(random.randint(1, 9))
        fit(
            model,
            sentiment(),
            tokenizer,
            epochs=1.5,
            learning_rate=1e-3,
            seed=seed,
            dropout=None,
            progress=False,
        )
    assert same(models[0], models[1]) and not same(models[0], models[2])


def test_the_process_is_left_as_it_was(
    bert: Callable[..., Any],
    sentiment: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    task, model = sentiment(), bert()
    before = [random.random(), numpy.random.random(), torch.rand(1).item()]
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    expected = [random.random(), numpy.random.random(), torch.rand(1).item()]
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    levels = logging.getLogger("transformers").level
    fit(model, task, tokenizer, max_steps=2, freeze=("embeddings",), progress=False)
    assert [random.random(), numpy.random.random(), torch.rand(1).item()] == expected != before
    assert logging.getLogger("transformers").level == levels
    assert list(tmp_path.iterdir()) == []
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["sentiment", "language"])
@pytest.mark.parametrize("distilled", [False, True])
def test_accumulation_is_one_large_batch(
    kind: str, distilled: bool, request: pytest.FixtureRequest, tokenizer: Any
) -> None:
    """Unequal micro-batches (24 = 10 + 10 + 4, sentences of unequal length) give the step of the whole."""
    task = request.getfixturevalue(kind)(24)
    make = request.getfixturevalue("bert" if kind == "sentiment" else "llama")
    options: dict[str, Any] = {"max_steps": 1, "learning_rate": 1e-2, "warmup": 0.0}
    if distilled:
        teacher = Teacher(make(width=32), task, tokenizer)
        settings = Distillation(alpha=0.6, hidden=0.5, relation=0.5, attention=0.5 if kind == "sentiment" else 0.0)
        options |= {"teacher": teacher, "distillation": settings}
        if kind == "sentiment":
            options["distillation"] = Distillation(alpha=0.6, hidden=0.5, relation=0.5, attention=0.5)
    results = []
    for batch_size, accumulation in ((24, 1), (10, 3)):
        model = make()
        loss = fit(
            model,
            task,
            tokenizer,
            batch_size=batch_size,
            accumulation=accumulation,
            progress=False,
            **options,
        )
        results.append((loss.loss, model))
    (whole, one), (parts, other) = results
    assert parts == pytest.approx(whole, rel=1e-4)
    before = make()
    for a, b, c in zip(one.parameters(), other.parameters(), before.parameters(), strict=True):
        # AdamW's first step is lr * sign(gradient): compare where the gradient is not nearly 0.
        moved = (a - c).abs() > 0.9e-2
        torch.testing.assert_close(a[moved], b[moved], rtol=1e-3, atol=1e-5)


def test_epochs_may_be_fractions_and_steps_are_a_limit(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any
) -> None:
    for options, steps in (
        ({"epochs": 0.5}, 2),
        ({"epochs": 2.5}, 8),
        ({"epochs": 9, "max_steps": 4}, 4),
        ({"epochs": 1, "max_steps": 40}, 3),
        ({"epochs": 1, "limit": 10}, 1),
        ({"epochs": 2, "accumulation": 2}, 4),
    ):
        assert fit(bert(), sentiment(), tokenizer, progress=False, **options).steps == steps


def test_frozen_parts_keep_every_bit(bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any) -> None:
    before, model = bert(), bert()
    fit(model, sentiment(), tokenizer, max_steps=3, learning_rate=1e-2, progress=False,
        freeze=("embeddings", "encoder.layer.0", "bert.encoder.layer.1.attention"))  # fmt: skip
    ours, theirs = model.state_dict(), before.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed and not any("word_embeddings" in n or "layer.0" in n or "layer.1.attention" in n for n in changed)
    assert "bert.encoder.layer.1.output.dense.weight" in changed
    with pytest.raises(LeanError, match="nowhere"):
        fit(model, sentiment(), tokenizer, freeze=("nowhere",), progress=False)
    with pytest.raises(LeanError, match="Nothing is left"):
        fit(model, sentiment(), tokenizer, freeze=("bert", "classifier"), progress=False)


def test_a_tied_head_is_frozen_with_its_table(
    llama: Callable[..., Any], language: Callable[..., Any], tokenizer: Any
) -> None:
    model = llama()
    fit(model, language(), tokenizer, max_steps=2, learning_rate=1e-2, freeze=("embeddings",), progress=False)
    assert torch.equal(model.lm_head.weight, llama().lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.use_cache


def test_half_precision_weights_are_trained_in_float32(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any
) -> None:
    whole, half = bert(), bert().bfloat16()
    options: dict[str, Any] = {
        "epochs": 3,
        "learning_rate": 1e-5,
        "warmup": 0.0,
        "dropout": 0.0,
        "progress": False,
    }
    before = copy.deepcopy(half)
    # 9 steps of 1e-5 are below bfloat16's spacing of weights near 0.02: each alone would be rounded away.
    fit(half, sentiment(), tokenizer, **options)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and not same(half, before)
    fit(whole.bfloat16().float(), sentiment(), tokenizer, **options)
    assert same(half, whole.bfloat16())


class Look:
    """Which types the weights have while they train, by whether they do."""

    def __init__(self, stop: bool = False) -> None:
        self.seen: set[tuple[bool, torch.dtype]] = set()
        self.stop = stop

    def after_step(self, model: Any, step: int, total: int) -> None:
        self.seen |= {(p.requires_grad, p.dtype) for p in model.parameters()}
        if self.stop:
            raise KeyboardInterrupt


def test_frozen_halves_stay_halves_while_the_others_train(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any
) -> None:
    """Nor are they copied; what is learnt is what float32 throughout would learn, to bfloat16's rounding."""
    options: dict[str, Any] = {"epochs": 9, "learning_rate": 5e-3, "freeze": ("embeddings",), "progress": False}
    whole, half, look = bert().bfloat16().float(), bert().bfloat16(), Look()
    table = half.get_input_embeddings().weight
    place = table.data_ptr()
    loss = fit(half, sentiment(), tokenizer, **options, callbacks=[look]).loss
    assert look.seen == {(False, torch.bfloat16), (True, torch.float32)} and table.data_ptr() == place
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and all(p.requires_grad for p in half.parameters())
    assert loss == pytest.approx(fit(whole, sentiment(), tokenizer, **options).loss, rel=0.1)
    precise = Look()
    fit(half, sentiment(), tokenizer, **options | {"epochs": 1}, bf16=False, callbacks=[precise])
    assert {dtype for _, dtype in precise.seen} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_an_interrupted_training_leaves_the_type_of_the_weights(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any
) -> None:
    for freeze in ((), ("embeddings",), ("bert.encoder.layer.0",)):
        model = bert().half()
        fit(model, sentiment(), tokenizer, freeze=freeze, max_steps=1, progress=False)
        assert {p.dtype for p in model.parameters()} == {torch.float16}
        with pytest.raises(KeyboardInterrupt):
            fit(model, sentiment(), tokenizer, freeze=freeze, progress=False, callbacks=[Look(stop=True)])
        assert {p.dtype for p in model.parameters()} == {torch.float16} and not model.training


def test_callbacks_see_every_step(bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []

    class Mask:
        def after_step(self, model: Any, step: int, total: int) -> None:
            seen.append((step, total))
            model.classifier.weight.data[:, 0] = 0

    model = bert()
    fit(model, sentiment(), tokenizer, epochs=2, callbacks=[Mask()], learning_rate=1e-2, progress=False)
    assert seen == [(step, 6) for step in range(1, 7)]
    assert model.classifier.weight[:, 0].abs().max() == 0 and model.classifier.weight[:, 1].abs().min() > 0


def test_schedules() -> None:
    assert [progress_of(s, 10, 0.2, 0.8) for s in (1, 5, 9)] == pytest.approx([0.0, 0.5, 1.0])
    assert [cubic(s, 10, 0.0, 0.8) for s in (0, 10)] == [0.0, 0.8]
    values = [cubic(s, 10, 0.0, 0.8, end=0.5) for s in range(11)]
    assert values == sorted(values) and values[5] == values[10] == 0.8 and values[1] > 0.8 / 5


def test_divergence_is_an_error_of_its_own(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any
) -> None:
    with pytest.raises(FloatingPointError, match="learning rate") as caught:
        fit(bert(), sentiment(), tokenizer, epochs=9, learning_rate=1e30, warmup=0.0, progress=False)
    assert isinstance(caught.value, TrainingDiverged) and isinstance(caught.value, LeanError)


def test_ctrl_c_leaves_a_usable_model(bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any) -> None:
    class Interrupt:
        def after_step(self, model: Any, step: int, total: int) -> None:
            if step == 2:
                raise KeyboardInterrupt

    task, model = sentiment(), bert()
    before = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        fit(model, task, tokenizer, epochs=2, dropout=0.0, freeze=("embeddings",), learning_rate=1e-2,
            callbacks=[Interrupt()], progress=False)  # fmt: skip
    assert not model.training and all(p.requires_grad for p in model.parameters()) and not same(model, before)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    assert fit(model, task, tokenizer, max_steps=1, progress=False).steps == 1


def test_progress_joins_a_running_one_and_goes_to_stderr(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    import io

    from rich.console import Console
    from rich.progress import Progress

    fit(bert(), sentiment(), tokenizer, max_steps=1, progress=True)
    assert capfd.readouterr().out == ""
    with Progress(console=Console(file=io.StringIO(), force_terminal=True)) as outer:
        outer.add_task("Search", total=3)
        fit(bert(), sentiment(), tokenizer, max_steps=1, progress=outer)
        assert len(outer.tasks) == 1


def test_an_embedder_without_a_teacher_has_nothing_to_learn_from(
    bert: Callable[..., Any], embedding: Callable[..., Any], tokenizer: Any
) -> None:
    with pytest.raises(LeanError, match="teacher"):
        fit(bert(labels=0), embedding(), tokenizer, progress=False)
    pairs = embedding(24, objective="pairs")
    model = bert(labels=0)
    assert fit(model, pairs, tokenizer, epochs=20, batch_size=8, learning_rate=5e-3, progress=False).loss < 2.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": float("nan")},
        {"learning_rate": -1.0},
        {"batch_size": 0},
        {"accumulation": 0},
        {"max_steps": 0},
        {"warmup": 1.5},
        {"dropout": 1.0},
        {"clip": -1.0},
        {"bf16": True},
        {"freeze": "embeddings"},
        {"split": "elsewhere"},
    ],
)
def test_wrong_arguments_are_refused(
    wrong: dict[str, Any], bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any
) -> None:
    with pytest.raises(LeanError, match=next(iter(wrong))):
        fit(bert(), sentiment(), tokenizer, progress=False, **wrong)
