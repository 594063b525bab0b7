import pytest
import torch

from leanformers.errors import LeanError
from leanformers.parts import LowRankLinear

from .making import IN, OUT, conv1d, linear, tokens


def carried(old: torch.nn.Module, rank: int) -> LowRankLinear:
    part = LowRankLinear.like(old, rank)
    part.carry(old)
    return part


def test_full_rank_is_identity() -> None:
    old = linear()
    torch.testing.assert_close(carried(old, IN)(tokens(5)), old(tokens(5)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 8, 23])
def test_the_error_is_that_of_the_dropped_singular_values(rank: int) -> None:
    old = linear()
    error = (old.weight - carried(old, rank).weight).square().sum()
    dropped = torch.linalg.svdvals(old.weight)[rank:].square().sum()
    torch.testing.assert_close(error, dropped, rtol=1e-4, atol=1e-6)


def test_the_spectrum_is_split_evenly() -> None:
    part = carried(linear(), 8)
    singular = torch.linalg.svdvals(linear().weight)[:8]
    torch.testing.assert_close(part.up.weight.norm(dim=0).square(), singular, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.down.weight.norm(dim=1).square(), singular, rtol=1e-4, atol=1e-5)


def test_conv1d_and_linear_of_one_matrix_agree() -> None:
    one, other = carried(linear(), 8), carried(conv1d(), 8)
    assert all(torch.equal(one.state_dict()[name], other.state_dict()[name]) for name in one.state_dict())


def test_given_factors_are_taken_as_they_are() -> None:
    old, up, down = linear(), torch.randn(OUT, 4), torch.randn(4, IN)
    part = LowRankLinear.like(old, 4)
    part.carry(old, up=up, down=down)
    assert torch.equal(part.up.weight, up) and torch.equal(part.down.weight, down)
    assert torch.equal(part.up.bias, old.bias)
    with pytest.raises(LeanError, match="factor up is"):
        part.carry(old, up=up[:, :3], down=down)
    with pytest.raises(LeanError, match="both or neither"):
        part.carry(old, up=up)


def test_half_precision_is_factorised_in_float32() -> None:
    old = linear().to(torch.bfloat16)
    part = carried(old, IN)
    assert part.up.weight.dtype == torch.bfloat16
    torch.testing.assert_close(part.weight.float(), old.weight.float(), rtol=0.05, atol=0.01)


def test_it_learns() -> None:
    old, part = linear(), carried(linear(), 2)
    target, optimiser = old(tokens(64)).detach(), torch.optim.Adam(part.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        loss = (part(tokens(64)) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(LeanError, match="rank"):
        LowRankLinear.like(linear(), rank)


def test_a_rank_above_the_full_one_is_refused() -> None:
    with pytest.raises(LeanError, match="full rank"):
        carried(linear(), IN + 1)
