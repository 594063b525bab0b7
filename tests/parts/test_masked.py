import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from leanformers.errors import LeanError
from leanformers.parts import MaskedLinear
from leanformers.parts.masked import pack_bits, parse_pattern, unpack_bits

from .making import IN, OUT, linear, masked, random_mask, reload, tokens

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=0, max_size=70))
def test_packing_and_back(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(len(bits) / 8)
    assert unpack_bits(packed, (len(bits),)).tolist() == bits


def test_the_first_bit_is_the_lowest() -> None:
    assert pack_bits(torch.tensor([[True, False, False], [True, True, False]])).tolist() == [0b011001]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (40, 24)])
def test_the_mask_comes_back_in_its_shape(shape: tuple[int, int]) -> None:
    mask = random_mask(*shape)
    assert torch.equal(unpack_bits(pack_bits(mask), shape), mask)


def test_survivors_are_untouched_and_the_rest_is_zero() -> None:
    old, part, mask = linear(), masked(linear()), random_mask()
    assert torch.equal(part.mask, mask)
    assert torch.equal(part.weight, torch.where(mask, old.weight, 0.0))
    assert part.density == pytest.approx(mask.float().mean().item())
    assert part.mask_bits.numel() == math.ceil(OUT * IN / 8)


def test_nothing_masked_is_identity() -> None:
    old, part = linear(), MaskedLinear.like(linear())
    part.carry(old, torch.ones(OUT, IN, dtype=torch.bool))
    assert torch.equal(part(tokens(5)), old(tokens(5)))


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_zeros_stay_zero_in_training(optimiser: str, evaluating: bool) -> None:
    part = masked(linear()).train(not evaluating)
    steps, before = OPTIMISERS[optimiser](part.parameters()), part.weight.detach().clone()
    for seed in range(6):
        steps.zero_grad()
        part(tokens(9, seed=seed)).square().mean().backward()
        assert not part.weight.grad[~part.mask].any()
        steps.step()
    assert not part.weight[~part.mask].any()
    assert (part.weight != before)[part.mask].all()


def test_gradients_are_those_of_the_masked_weight() -> None:
    part, plain = masked(linear()), (linear().weight * random_mask()).detach().requires_grad_()
    part(tokens(7)).square().sum().backward()
    F.linear(tokens(7), plain, part.bias.detach()).square().sum().backward()
    torch.testing.assert_close(part.weight.grad, plain.grad * random_mask())


def test_it_trains_on_after_reloading(tmp_path: Path) -> None:
    part = reload(masked(linear()), MaskedLinear.like, linear(), tmp_path)
    assert torch.equal(part.mask, random_mask())
    steps = OPTIMISERS["adamw"](part.parameters())
    part(tokens(9)).square().mean().backward()
    steps.step()
    assert not part.weight[~random_mask()].any()


def test_inference_never_unpacks_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    part = masked(linear())
    monkeypatch.setattr("leanformers.parts.masked.unpack_bits", lambda *_: pytest.fail("unpacked"))
    with torch.no_grad():
        part(tokens(3))
    part.requires_grad_(False)
    part(tokens(3).requires_grad_())


@pytest.mark.parametrize(
    ("pattern", "parsed"), [("unstructured", None), ("2:4", (2, 4)), ("1:2", (1, 2)), ("4:8", (4, 8))]
)
def test_patterns(pattern: str, parsed: tuple[int, int] | None) -> None:
    assert parse_pattern(pattern, IN) == parsed


@pytest.mark.parametrize("pattern", ["2:5", "5:4", "0:4", "2of4", "", "-1:4", "2:0"])
def test_impossible_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(LeanError, match="pattern"):
        MaskedLinear.like(linear(), pattern)


def test_a_mask_must_follow_its_pattern() -> None:
    old, part = linear(), MaskedLinear.like(linear(), "2:4")
    part.carry(old, torch.tensor([True, False, False, True]).repeat(OUT, IN // 4))
    assert part.density == 0.5
    with pytest.raises(LeanError, match="exactly 2 of every 4"):
        part.set_mask(torch.tensor([True, False, False, False]).repeat(OUT, IN // 4))


@pytest.mark.parametrize("mask", [torch.ones(OUT, IN), torch.ones(IN, OUT, dtype=torch.bool)])
def test_a_mask_of_another_make_is_refused(mask: torch.Tensor) -> None:
    with pytest.raises(LeanError, match="this layer needs"):
        masked(linear()).set_mask(mask)
