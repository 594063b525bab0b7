"""The integer kernel against the plain float operations that it stands for."""

import copy
import gc

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from leanformers.parts import int8

from .making import tokens


def matrix(out_features: int = 33, in_features: int = 50, limit: int = 64, seed: int = 0):
    """Int8 `[out, in]` of at most `limit` in size, and scales `[out, 1]`."""
    generator = torch.Generator().manual_seed(seed)
    qdata = torch.randint(-limit, limit + 1, (out_features, in_features), generator=generator).clamp(-128, 127)
    return qdata.to(torch.int8), torch.rand(out_features, 1, generator=generator) * 0.01 + 1e-4


def plain(hidden_states: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return int8.float_linear(int8.round_tokens(hidden_states), qdata, scale)


needs_kernel = pytest.mark.skipif(int8.packed(*matrix()) is None, reason="this CPU has no integer kernel")


@pytest.mark.parametrize(
    ("tokens_", "in_features", "out_features"), [(1, 50, 33), (7, 384, 8), (65, 3072, 16), (3, 1, 1)]
)
@pytest.mark.parametrize("extreme", [False, True])
def test_kernel_and_floats_agree(tokens_: int, in_features: int, out_features: int, extreme: bool) -> None:
    qdata, scale = matrix(out_features, in_features)
    hidden_states = torch.randn(tokens_, in_features)
    if extreme:  # every product at its limit: the sums that saturating instructions get wrong
        qdata.fill_(-64)
        hidden_states = torch.ones(tokens_, in_features) * torch.linspace(-3, 5, tokens_)[:, None]
    outputs = torch.ops.leanformers.dynamic_linear(hidden_states, qdata, scale, None)
    expected = plain(hidden_states.double(), qdata, scale.double()).float()
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_tokens_do_not_disturb_each_other() -> None:
    qdata, scale = matrix(in_features=24)
    together, alone = tokens(5), tokens(5)[2:3].clone()
    together[0] *= 1e4
    outputs = int8.dynamic_linear(together, qdata, scale)[2:3]
    torch.testing.assert_close(outputs, int8.dynamic_linear(alone, qdata, scale), rtol=1e-6, atol=1e-6)


def test_zeros_and_nan_come_out_as_they_went_in() -> None:
    qdata, scale = matrix()
    hidden_states = torch.zeros(3, 50)
    hidden_states[1, 7] = float("nan")
    outputs = int8.dynamic_linear(hidden_states, qdata, scale)
    assert not outputs[[0, 2]].any() and outputs[1].isnan().all()


def test_wide_weights_are_left_to_floats() -> None:
    qdata, scale = matrix(limit=127)
    assert int8.packed(qdata, scale) is None
    hidden_states = torch.randn(4, 50)
    torch.testing.assert_close(int8.dynamic_linear(hidden_states, qdata, scale), plain(hidden_states, qdata, scale))


def test_without_the_kernel_floats_do(monkeypatch: pytest.MonkeyPatch) -> None:
    qdata, scale = matrix()
    expected = int8.dynamic_linear(tokens(4).repeat(1, 3)[:, :50], qdata, scale)
    monkeypatch.setattr(int8, "_pack", lambda *_: None)
    outputs = int8.dynamic_linear(tokens(4).repeat(1, 3)[:, :50], qdata.clone(), scale)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)


@needs_kernel
def test_a_write_packs_anew() -> None:
    qdata, scale = matrix()
    hidden_states = torch.randn(3, 50)
    before = int8.dynamic_linear(hidden_states, qdata, scale)
    assert int8.packed(qdata, scale) is int8.packed(qdata, scale)
    qdata.neg_()
    torch.testing.assert_close(int8.dynamic_linear(hidden_states, qdata, scale), -before)
    scale.mul_(2)
    torch.testing.assert_close(int8.dynamic_linear(hidden_states, qdata, scale), -2 * before)
    twin = copy.deepcopy(qdata).zero_()
    assert not int8.dynamic_linear(hidden_states, twin, scale).any()


@needs_kernel
def test_packed_matrices_go_with_their_tensors() -> None:
    gc.collect()
    first, scale = matrix()
    int8.packed(first, scale)
    kept = len(int8._packed)
    for seed in range(20):
        int8.packed(*matrix(seed=seed))
    assert len(int8._packed) <= kept + 1


def test_training_and_inference_agree() -> None:
    qdata, scale = matrix(in_features=24)
    trained = int8.dynamic_linear(tokens(6).requires_grad_(), qdata, scale)
    assert trained.requires_grad
    torch.testing.assert_close(trained, int8.dynamic_linear(tokens(6), qdata, scale), rtol=1e-5, atol=1e-5)


def test_inference_tensors_are_not_packed() -> None:
    with torch.inference_mode():
        qdata, scale = matrix()
        assert int8.packed(qdata, scale) is None
        int8.dynamic_linear(torch.randn(2, 50), qdata, scale)


def test_half_precision_does_not_overflow() -> None:
    qdata, scale = torch.full((4, 4096), 127, dtype=torch.int8), torch.full((4, 1), 1e-4)
    outputs = int8.float_linear(torch.ones(2, 4096, dtype=torch.float16), qdata, scale)
    assert outputs.dtype == torch.float16 and outputs.isfinite().all()


def test_flops_are_counted() -> None:
    qdata, scale = matrix(in_features=24)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        int8.dynamic_linear(tokens(2, 5), qdata, scale)
    assert counter.get_total_flops() == 2 * 10 * 24 * 33


def test_the_operator_is_well_formed() -> None:
    qdata, scale = matrix(in_features=24)
    torch.library.opcheck(torch.ops.leanformers.dynamic_linear.default, (tokens(5), qdata, scale, torch.randn(33)))
