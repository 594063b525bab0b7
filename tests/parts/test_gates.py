"""The variational gate and the norm over a part of the dimensions."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from leanformers.parts.gates import Gate, restricted_norm


def gate(size: int = 6, **values: torch.Tensor) -> Gate:
    made = Gate(size, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, value in values.items():
            getattr(made, name).copy_(value)
    return made


def test_divergence_is_the_formula_with_its_gradient():
    mean, variance = torch.tensor([0.5, -1.0, 2.0, 0.1]), torch.tensor([0.1, 1.0, 4.0, 0.5])
    made = gate(4, mean=mean, log_variance=variance.log())
    ratio = (mean.double().square() / variance.double()).tolist()
    found = made.divergence()
    assert found.item() == pytest.approx(sum(0.5 * math.log(1 + r) for r in ratio), rel=1e-6)
    found.backward()
    of_mean = mean / (variance + mean.square())  # d/dm 1/2 log(1 + m^2/v)
    of_log_variance = -0.5 * mean.square() / (variance + mean.square())
    torch.testing.assert_close(made.mean.grad, of_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.log_variance.grad, of_log_variance, rtol=1e-5, atol=1e-6)


def test_a_unit_that_gives_nothing_costs_nothing():
    made = gate(3, mean=torch.zeros(3))
    made.divergence().backward()
    assert made.divergence().item() == 0 and torch.equal(made.mean.grad, torch.zeros(3))
    made(torch.zeros(2, 3)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())
    assert made.information().isfinite().all() and made.shares().isfinite().all()


def test_a_new_gate_is_nearly_transparent_and_counts_every_unit():
    made, states = Gate(512), torch.randn(7, 512)
    assert (made(states) - states).abs().max() < 0.2
    assert made.shares().sum().item() == pytest.approx(512)


def test_a_sure_gate_is_the_identity():
    made = gate(6, mean=torch.ones(6), log_variance=torch.full((6,), -100.0))
    states = torch.randn(2, 3, 12)
    assert torch.equal(made(states), states)
    assert torch.equal(made.eval()(states), states)


def test_noise_is_fresh_for_each_token_and_shared_by_the_features_of_a_unit():
    made = gate(4, mean=torch.ones(4), log_variance=torch.zeros(4))
    scale = made(torch.ones(2, 500, 12)).view(1000, 4, 3)
    assert torch.equal(scale[..., 0], scale[..., 2])
    assert len(scale[..., 0].unique()) == 4000  # no token, no unit alike
    assert scale[..., 0].std(0).mean().item() == pytest.approx(1, abs=0.05)
    made.eval()
    assert torch.equal(made(torch.ones(2, 500, 12)), torch.ones(2, 500, 12))


def test_soft_counts_of_saturated_gates_are_hard_counts():
    made = gate(5, mean=torch.tensor([1.0, 0.01, 1.0, 0.01, 1.0]), log_variance=torch.full((5,), -4.0))
    assert made.shares().sum().item() == pytest.approx(3, abs=1e-6)


def test_settled_gates_silence_what_is_gone():
    made = gate(4, mean=torch.tensor([2.0, 0.0, 1.0, -3.0])).eval()
    made.settle(torch.tensor([True, True, False, True]))
    scale = made(torch.ones(1, 4))[0].tolist()
    assert scale[0] == 2 and 0 < scale[1] < 1e-3 and scale[2] == 0 and scale[3] == -3


def norms(kind: str, size: int) -> torch.nn.Module:
    made = {"layer": torch.nn.LayerNorm, "rms": LlamaRMSNorm, "gemma": Gemma3RMSNorm}[kind](size)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(size))
    return made


@pytest.mark.parametrize("kind", ["layer", "rms", "gemma"])
def test_a_restricted_norm_is_the_norm_of_the_cut_model(kind):
    whole, states = norms(kind, 12), torch.randn(3, 5, 12)
    options = {"rms": kind != "layer", "offset": kind == "gemma"}
    same = restricted_norm(states, whole, torch.ones(12), **options)
    torch.testing.assert_close(same, whole(states), rtol=1e-5, atol=1e-6)
    share = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1])
    keep = share.bool()
    small = norms(kind, 9)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            parameter.copy_(getattr(whole, name)[keep])
    found = restricted_norm(states * share, whole, share, **options)
    torch.testing.assert_close(found[..., keep], small(states[..., keep]), rtol=1e-5, atol=1e-6)
    assert found[..., ~keep].abs().max() == 0
    torch.testing.assert_close(restricted_norm(states, whole, share, **options), found, rtol=1e-5, atol=1e-6)
