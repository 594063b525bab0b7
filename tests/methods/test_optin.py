"""The identities of the card optin."""

from __future__ import annotations

import pytest
import torch
from subjects import BOTH, decoder, encoder, outputs

from leanformers.methods import get
from leanformers.methods.compress.optin import Optin, Scorer, _gram_error, _grams, _total, _unit_cost, select


def scores(subject, **settings):
    settings = {"samples": 8, "rows": 32, "neuron_group": 16, **settings}
    batch = next(subject.calibration(settings["samples"], batch_size=settings["samples"]))
    return Scorer(subject, batch, Optin(**settings)).scores()


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_the_whole_budget_keeps_everything(make):
    subject = make()
    get("optin").build({"budget": 1.0})(subject)
    assert torch.equal(outputs(subject), outputs(make()))
    kept = select(subject.anatomy, scores(subject), 1.0, 10.0)
    assert all(len(neurons) == 64 for _, neurons in kept)


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_scoring_leaves_the_model_as_it_was(make):
    subject = make()
    before = outputs(subject)
    scores(subject)
    assert torch.equal(outputs(subject), before)
    assert not any("forward" in module.__dict__ for module in subject.model.modules())


def test_answering_from_the_reference_changes_no_score():
    subject = encoder()
    fast = scores(subject)

    class Slow(Scorer):
        def _cached(self, first):
            return super()._cached(0)

    batch = next(subject.calibration(8, batch_size=8))
    slow = Slow(subject, batch, Optin(samples=8, rows=32, neuron_group=16)).scores()
    assert fast.keys() == slow.keys()
    assert all(fast[unit] == pytest.approx(slow[unit], rel=1e-4, abs=1e-6) for unit in fast)


def test_kept_neurons_are_a_multiple_where_that_is_asked_for():
    subject = encoder()
    get("optin").build({"budget": 0.6, "samples": 8, "rows": 32, "neuron_group": 5, "multiple": 8})(subject)
    sizes = [layer.feed_forward.intermediate_size for layer in subject.anatomy.layers]
    assert all(size % 8 == 0 for size in sizes) and min(sizes) < 64


def test_a_unit_without_outgoing_weights_scores_zero():
    subject = encoder()
    layer = subject.anatomy.layers[1]
    with torch.no_grad():
        layer.attention.output.module.weight[:, 8:16] = 0
        layer.feed_forward.down.module.weight[:, 5] = 0
    found = scores(subject, neuron_group=1)
    assert found[(1, "head", (1,))] == 0 and found[(1, "neuron", (5,))] == 0
    assert found[(1, "head", (0,))] > 0


def test_the_order_of_the_batch_does_not_matter():
    subject = encoder(initializer_range=0.3)  # differences well above rounding
    batch = next(subject.calibration(8, batch_size=8))
    real = int(batch["attention_mask"].sum())
    settings = Optin(samples=8, rows=real, neuron_group=16)  # all rows: none is drawn
    there = Scorer(subject, batch, settings).scores()
    back = Scorer(subject, {name: tensor.flip(0) for name, tensor in batch.items()}, settings).scores()
    assert all(there[unit] == pytest.approx(back[unit], rel=1e-2, abs=1e-4) for unit in there)


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
def test_the_budget_is_met_and_used(make, budget):
    subject = make()
    found = scores(subject, neuron_group=1)
    anatomy, length = subject.anatomy, 12.0
    kept = select(anatomy, found, budget, length)
    spent = 0.0
    for index, (heads, neurons) in enumerate(kept):
        assert heads and neurons
        spent += sum(_unit_cost(anatomy, (index, "head", (head,)), length) for head in heads)
        spent += sum(_unit_cost(anatomy, (index, "neuron", (neuron,)), length) for neuron in neurons)
    largest = max(_unit_cost(anatomy, unit, length) for unit in found)
    assert budget * _total(anatomy, length) - largest < spent <= budget * _total(anatomy, length)


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_the_model_shrinks_and_the_seed_decides(make):
    settings = {"budget": 0.5, "samples": 8, "rows": 32, "neuron_group": 8}
    subject, again = make(), make()
    before = subject.anatomy.parameters()
    for one in (subject, again):
        get("optin").build(settings)(one)
    assert subject.anatomy.parameters() < before
    assert torch.equal(outputs(subject), outputs(again))


def test_gram_errors_agree_however_they_are_computed():
    torch.manual_seed(0)
    for rows, width in ((5, 9), (9, 5)):
        one, other = torch.randn(rows, width), torch.randn(rows, width)
        a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (one, other))
        expected = (a @ a.t() - b @ b.t()).square().sum().item()
        assert _gram_error(_grams(one), other) == pytest.approx(expected, rel=1e-4)


def test_a_budget_below_one_head_per_layer_is_refused():
    subject = decoder()
    assert "below the cost" in get("optin").unsuitable(subject.anatomy, subject.task, {"budget": 0.01})
