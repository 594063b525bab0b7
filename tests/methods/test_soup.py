"""A soup is the average of trainings from one start, each with a seed of its own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from subjects import encoder

from leanformers.errors import Enough
from leanformers.frontier.clock import Clock, Stop
from leanformers.methods import get
from leanformers.methods.subject import Budget
from leanformers.training import Teacher
from leanformers.training.soup import averaged

SETTINGS = {"epochs": 1.0, "learning_rate": 1e-3, "batch_size": 4}
FEW = SETTINGS | {"epochs": 0.25}


def weights(subject):
    return {name: p.detach().clone() for name, p in subject.model.named_parameters()}


@pytest.mark.parametrize("method", ["fine-tune", "distillation"])
def test_a_soup_is_the_mean_of_its_trainings(method):
    subject, singles = encoder(), []
    if method == "distillation":
        subject.teacher = Teacher(copy.deepcopy(subject.model), subject.task, subject.tokenizer)
        with torch.no_grad():
            subject.model.classifier.weight.normal_()
    settings = SETTINGS | ({"augment": 1} if method == "distillation" else {})
    for seed in range(3):
        single = copy.copy(subject)
        single.model, single.seed = copy.deepcopy(subject.model), seed
        get(method).build(settings)(single)
        singles.append(weights(single))
    get(method).build(settings | {"soup": 3})(subject)
    assert any(not torch.equal(singles[0][name], singles[1][name]) for name in singles[0])
    for name, found in weights(subject).items():
        expected = torch.stack([single[name].double() for single in singles]).mean(0)
        assert (found - expected).abs().max() <= 1e-6, name
    assert subject.full_examples == subject.trained_examples > 0


def test_an_estimate_trains_one():
    subject = encoder()
    subject.budget = Budget(examples=8, epochs=1.0)
    get("fine-tune").build(SETTINGS | {"soup": 3})(subject)
    assert subject.trained_examples == 8 and subject.full_examples == 3 * len(subject.task.splits["train"])


def test_what_is_frozen_stays_and_types_stay():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).bfloat16()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()

    def train(run):
        model[1].weight.data += run + 1
        return run

    start = model[1].weight.detach().clone()
    assert averaged(model, train, 2) == [0, 1]
    assert torch.equal(model[0].weight, before) and model[1].weight.dtype is torch.bfloat16
    assert torch.allclose(model[1].weight, start + 1.5, atol=2e-2)


def test_a_soup_that_was_cut_off_goes_on(tmp_path):
    """What a finished training left is read back, so that the average is that of the trainings without a break."""
    whole, broken = encoder(), encoder()
    get("fine-tune").build(SETTINGS | {"soup": 2})(whole)

    class Cut:
        def after_step(self, model, step, total):
            if (tmp_path / "train-1").exists():
                raise KeyboardInterrupt

    start = copy.deepcopy(broken.model)
    broken.output_dir, broken.callbacks = tmp_path, (Cut(),)
    with pytest.raises(KeyboardInterrupt):
        get("fine-tune").build(SETTINGS | {"soup": 2})(broken)
    broken.model, broken.callbacks, broken.notes = start, (), {}
    get("fine-tune").build(SETTINGS | {"soup": 2})(broken)
    for name, found in weights(broken).items():
        assert torch.equal(found, weights(whole)[name]), name


def steps_of(subject):
    return math.ceil(FEW["epochs"] * math.ceil(len(subject.task.splits["train"]) / FEW["batch_size"]))


class Ends:
    """Has enough after so many steps of the soup, as it is told them."""

    def __init__(self, after):
        self.after, self.told = after, []

    def after_step(self, model, step, total):
        self.told.append((step, total))
        if step >= self.after:
            raise Enough


@pytest.mark.parametrize(("run", "counted"), [(0, 1), (1, 1), (2, 2)])
def test_a_soup_whose_time_is_up_begins_no_further_training(run, counted):
    """Cut off in its first training, or in a later one, which then does not count: the whole ones do."""
    subject, singles = encoder(), []
    for seed in range(counted):
        single = copy.copy(subject)
        single.model, single.seed, single.callbacks = copy.deepcopy(subject.model), seed, (Ends(3),) if run == 0 else ()
        get("fine-tune").build(FEW)(single)
        singles.append(weights(single))
    each = steps_of(subject)
    ends = Ends(run * each + 3)
    subject.callbacks = (ends,)
    get("fine-tune").build(FEW | {"soup": 4})(subject)
    assert ends.told == [(step + 1, 4 * each) for step in range(run * each + 3)]
    assert subject.notes["cut"] == {"trainings": counted, "of_trainings": 4}
    for name, found in weights(subject).items():
        expected = torch.stack([single[name].double() for single in singles]).mean(0)
        assert (found - expected).abs().max() <= 1e-6, name


def test_a_few_steps_tell_what_a_whole_soup_takes():
    """A search times the first steps of a training: those of one tell of all."""
    subject, now = encoder(), iter(range(1000))
    each = steps_of(subject)
    stop = Stop(Clock(minutes=None, now=lambda: float(next(now))), steps=4)
    subject.callbacks = (stop,)
    get("fine-tune").build(FEW | {"soup": 3})(subject)
    assert (len(stop.times), stop.total, stop.early, stop.seconds) == (4, 3 * each, True, 3.0 * each)
