"""A term of the loss with parameters of its own: trained beside the model, ascended where asked, resumed, frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from leanformers.errors import LeanError
from leanformers.training import Penalty, fit


class Pull(Penalty):
    """Two scalars, one to make the term smaller, one larger; ``steps`` counts in a buffer."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.down, self.up = torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.zeros(()))
        self.weight, self.calls = weight, 0

    def forward(self) -> torch.Tensor:
        self.calls += 1
        return self.weight * (self.down + 0.5 * self.up)

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [self.down], "lr": 0.05, "weight_decay": 0.0},
            {"params": [self.up], "lr": 0.2, "weight_decay": 0.0, "maximize": True},
        ]

    def after_step(self, model: Any, step: int, total: int) -> None:
        self.steps.fill_(step)


def test_it_descends_and_ascends_at_its_own_rates(bert: Callable[..., Any], sentiment: Any, tokenizer: Any) -> None:
    model, pull = bert(), Pull()
    alone = bert()
    options: dict[str, Any] = {"max_steps": 1, "warmup": 0.0, "learning_rate": 1e-3, "progress": False, "clip": 0.0}
    fit(model, sentiment(), tokenizer, penalty=pull, **options)
    assert pull.down.item() == pytest.approx(0.95, abs=1e-4) and pull.up.item() == pytest.approx(1.2, abs=1e-4)
    assert pull.steps == 1 and not pull.training and "down" not in str(model.state_dict().keys())
    fit(alone, sentiment(), tokenizer, **options)
    ours, theirs = model.state_dict(), alone.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_parameters_without_a_group_take_the_trainings_rate(bert: Any, sentiment: Any, tokenizer: Any) -> None:
    pull = Pull()
    pull.groups = lambda: []  # type: ignore[method-assign]
    fit(bert(), sentiment(), tokenizer, penalty=pull, max_steps=1, warmup=0.0, learning_rate=1e-3, progress=False)
    assert pull.up.item() == pytest.approx(0.999, abs=2e-5)


def test_a_model_can_be_frozen_whole_and_keeps_its_precision(bert: Any, sentiment: Any, tokenizer: Any) -> None:
    model = bert().bfloat16()
    before = copy.deepcopy(model)
    seen = []

    class Look:
        def after_step(self, model: Any, step: int, total: int) -> None:
            seen.extend({p.dtype for p in model.parameters()})

    options: dict[str, Any] = {"max_steps": 2, "freeze": ("all",), "progress": False, "callbacks": [Look()]}
    fit(model, sentiment(), tokenizer, penalty=Pull(), **options)
    assert set(seen) == {torch.bfloat16} and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    with pytest.raises(LeanError, match="Nothing is left"):
        fit(model, sentiment(), tokenizer, **options)


def test_it_is_added_once_to_a_step_of_several_micro_batches(bert: Any, sentiment: Any, tokenizer: Any) -> None:
    losses = []
    for batch_size, accumulation in ((24, 1), (10, 3)):
        pull = Pull(weight=10.0)
        options: dict[str, Any] = {"batch_size": batch_size, "accumulation": accumulation, "max_steps": 1}
        losses.append(fit(bert(), sentiment(24), tokenizer, penalty=pull, progress=False, **options).loss)
        assert pull.calls == accumulation
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] > 15


def test_an_interrupted_training_goes_on_with_it(bert: Any, sentiment: Any, tokenizer: Any, tmp_path: Path) -> None:
    class Stop:
        def after_step(self, model: Any, step: int, total: int) -> None:
            if step == 3:
                raise KeyboardInterrupt

    options: dict[str, Any] = {"epochs": 2, "checkpoint_seconds": 0.0, "batch_size": 16, "progress": False}
    whole, again, first = Pull(), Pull(), Pull()
    models = [bert() for _ in range(3)]
    fit(models[0], sentiment(), tokenizer, penalty=whole, **options)
    with pytest.raises(KeyboardInterrupt):
        fit(models[1], sentiment(), tokenizer, penalty=first, output_dir=tmp_path, callbacks=[Stop()], **options)
    with pytest.raises(LeanError, match="penalty"):
        fit(bert(), sentiment(), tokenizer, output_dir=tmp_path, **options)
    fit(models[2], sentiment(), tokenizer, penalty=again, output_dir=tmp_path, **options)
    assert again.state_dict() == whole.state_dict() and again.steps == 12
    ours, theirs = models[2].state_dict(), models[0].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
