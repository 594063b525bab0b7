"""The identities of the card greenformers, part A."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from subjects import BOTH, encoder, outputs

from leanformers.anatomy import linear_shape
from leanformers.errors import LeanError
from leanformers.methods import get
from leanformers.methods.compress.greenformers import nmf, random, rank_of, semi_nmf, svd
from leanformers.parts import LowRankLinear
from leanformers.surgery import FactoriseLinear


@pytest.fixture
def weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 24, generator=generator), torch.randn(24, 32, generator=generator)
    return left * 0.8 ** torch.arange(24) @ right


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_full_rank_reproduces_the_dense_output(make):
    subject = make()
    for path in subject.anatomy.roles:
        out_features, in_features = linear_shape(subject.anatomy.module(path))
        subject.apply(FactoriseLinear(path=path, rank=min(out_features, in_features)))
    torch.testing.assert_close(outputs(subject), outputs(make()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("balance", [True, False])
def test_the_error_is_the_dropped_spectrum(weight, balance):
    up, down = svd(weight, 8, balance=balance)
    dropped = torch.linalg.svdvals(weight)[8:].square().sum()
    torch.testing.assert_close((weight - up @ down).square().sum(), dropped, rtol=1e-4, atol=0)


def test_svd_is_best_and_semi_nmf_beats_nmf(weight):
    def error(factors):
        return (weight - factors[0] @ factors[1]).norm().item()

    exact, semi, positive = svd(weight, 8), semi_nmf(weight, 8, 200), nmf(weight.clamp_min(0), 8, 200)
    assert error(exact) <= error(semi) <= error(positive)
    assert (semi[0] >= 0).all() and (positive[0] >= 0).all() and (positive[1] >= 0).all()


def test_semi_nmf_never_gets_worse(weight):
    errors = [(weight - up @ down).norm() for up, down in (semi_nmf(weight, 6, n) for n in (1, 5, 20, 80))]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))


def test_conv1d_and_linear_give_the_same_factors(weight):
    from transformers.pytorch_utils import Conv1D

    linear, conv = torch.nn.Linear(32, 40), Conv1D(40, 32)
    with torch.no_grad():
        linear.weight.copy_(weight)
        conv.weight.copy_(weight.t())
        conv.bias.copy_(linear.bias)
    parts = []
    for old in (linear, conv):
        part = LowRankLinear.like(old, 8)
        part.carry(old)
        parts.append(part)
    states = torch.randn(3, 32)
    assert torch.equal(parts[0](states), parts[1](states))


def test_the_rank_rule():
    assert rank_of(0.5, 384, 384) == 96 and rank_of(0.5, 384, 1536) == 153 and rank_of(0.5, 384, 1536, 8) == 152
    assert rank_of(16, 384, 384) == 16
    assert rank_of(192, 384, 384) == 0  # the break-even: nothing saved
    assert rank_of(0.01, 8, 8) == 0


@pytest.mark.parametrize("solver", ["svd", "snmf", "random"])
@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_it_saves_what_it_estimates(make, solver):
    subject = make()
    method = get("greenformers").build({"rank": 0.5, "solver": solver, "num_iter": 5})
    before, saving = subject.anatomy, method.estimate(subject.anatomy, 7)
    count, flops = before.parameters(), before.layer_flops(7)
    method(subject)
    after = subject.anatomy
    assert after.parameters() - count == saving.parameters < 0
    assert after.layer_flops(7) - flops == saving.flops < 0


def test_head_embeddings_and_classifier_stay_dense():
    subject = encoder()
    get("greenformers").build({"rank": 0.5})(subject)
    assert isinstance(subject.model.classifier, torch.nn.Linear)
    assert isinstance(subject.model.bert.pooler.dense, torch.nn.Linear)


def test_nmf_refuses_negative_weights_by_name():
    with pytest.raises(LeanError, match="query has negative weights"):
        get("greenformers").build({"solver": "nmf"})(encoder())


def test_a_rank_that_saves_nothing_is_refused():
    with pytest.raises(LeanError, match="no linear would get smaller"):
        get("greenformers").build({"rank": 32})(encoder())


def test_random_factors_have_the_scale_of_fresh_linears(weight):
    up, down = random(weight, 8, torch.Generator().manual_seed(0))
    assert up.abs().max() <= 8**-0.5 and down.abs().max() <= 32**-0.5
