"""The keep schedule and its arithmetic: the card's figures, bounds, and one knob that is monotone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanformers.errors import LeanError
from leanformers.parts.token_schedule import (
    LayerCost,
    check_curve,
    decay,
    fractions,
    gamma_for,
    largest_speedup,
    lengths,
    multiply_adds,
    rate,
    speedup,
)

LAYERS, LENGTH, WIDTH, INNER = 12, 128, 768, 3072
BASE = [LayerCost(attention=4 * WIDTH**2, pairs=2 * WIDTH, feed_forward=2 * WIDTH * INNER)] * LAYERS
CURVE = decay(0.25, LAYERS)


def test_the_dense_model_costs_what_the_card_says():
    assert multiply_adds(BASE, [1.0] * LAYERS, LENGTH) == 11_173_625_856


@pytest.mark.parametrize(("gamma", "expected"), [(0.0, 1.0), (0.5, 1.751), (1.0, 2.595), (2.0, 4.137)])
def test_speedups_are_the_cards(gamma, expected):
    assert round(speedup(BASE, CURVE, gamma, LENGTH), 3) == expected


def test_tokens_that_enter_the_layers_are_the_cards():
    counts = lengths(fractions(CURVE, 1.0), LENGTH)
    assert counts[:12] == [128, 128, 100, 78, 61, 48, 37, 29, 23, 18, 14, 11]


def test_a_curve_that_starts_at_one_bounds_the_speedup():
    """Layer 1 and the attention of layer 2 see all tokens: K < L F / (F + A), 8.9 here; with shift=1 it goes higher."""
    whole = BASE[0].of(LENGTH, LENGTH)
    attention = LENGTH * (BASE[0].attention + LENGTH * BASE[0].pairs)
    bound = LAYERS * whole / (whole + attention)
    assert round(bound, 1) == 8.9
    assert 0.9 * bound < largest_speedup(BASE, CURVE, LENGTH) < bound
    shifted = largest_speedup(BASE, decay(0.25, LAYERS, shift=1), LENGTH)
    assert bound < shifted < LAYERS * whole / attention


@given(gammas=st.lists(st.floats(0, 20), min_size=2, max_size=2), length=st.integers(1, 300), fall=st.floats(0, 1))
def test_the_knob_is_monotone_and_counts_never_rise(gammas, length, fall):
    curve = decay(fall, 6)
    costs = [LayerCost(attention=40, pairs=3, feed_forward=90)] * 6
    little, much = sorted(gammas)
    assert speedup(costs, curve, little, length) <= speedup(costs, curve, much, length)
    counts = lengths(fractions(curve, much), length)
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 1


@given(target=st.floats(1, 8), length=st.integers(2, 300), fall=st.floats(0.01, 1), shift=st.integers(0, 1))
def test_bisection_meets_the_target_or_refuses(target, length, fall, shift):
    curve = decay(fall, LAYERS, shift)
    if target > largest_speedup(BASE, curve, length):
        with pytest.raises(LeanError, match="out of reach"):
            gamma_for(target, BASE, curve, length)
        return
    gamma = gamma_for(target, BASE, curve, length)
    assert speedup(BASE, curve, gamma, length) >= target
    if target > 1:  # the next lower choice of counts misses it
        assert gamma == 0.0 or speedup(BASE, curve, gamma * (1 - 1e-6), length) < target


def test_a_share_that_is_whole_but_for_rounding_stays_whole():
    assert 0.1 * 3 * 10 > 3
    assert lengths([0.1 * 3], 10) == [10, 3]


def test_a_fit_finds_the_rate_of_an_exponential():
    assert rate(CURVE) == pytest.approx(0.25)
    assert rate([1.0]) == 0.0
    assert rate([0.2, 0.5, 1.0]) >= 0.0
    assert math.isfinite(rate([1.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        ((1.0, 0.5), "2 values and the model 3 layers"),
        ((1.0, 0.5, 0.6), "layer 2 is 0.6"),
        ((1.1, 0.5, 0.5), "layer 0 is 1.1"),
        ((1.0, 0.5, 0.0), "layer 2 is 0.0"),
        ((1.0, float("nan"), 0.5), "layer 1 is nan"),
    ],
)
def test_bad_curves_are_refused(curve, words):
    with pytest.raises(LeanError, match=words):
        check_curve(curve, 3)
    check_curve((1.0, 1.0, 0.2), 3)


@pytest.mark.parametrize("gamma", [-0.1, float("nan")])
def test_a_negative_gamma_is_refused(gamma):
    with pytest.raises(LeanError, match="gamma is"):
        fractions(CURVE, gamma)


@pytest.mark.parametrize("target", [0.9, -1.0, float("nan")])
def test_slower_than_dense_is_refused(target):
    with pytest.raises(LeanError, match="give 1"):
        gamma_for(target, BASE, CURVE, LENGTH)
