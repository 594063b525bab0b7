"""Rows found by position, schedules, and the attention of the last token."""

from __future__ import annotations

import random

import pytest
import torch

from families import TINY
from leanformers.anatomy import Anatomy
from leanformers.lazy import mean_keep, predicted_speedup, shares, spread
from leanformers.lazy.cache import last_token_scores
from leanformers.lazy.rows import Rows


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_a_dictionary_of_positions(seed):
    dice, rows, expected = random.Random(seed), Rows(), {}
    for _ in range(40):
        free = [position for position in range(300) if position not in expected]
        added = sorted(dice.sample(free, dice.randint(0, 9)))
        ordered = bool(added) and added[0] > max(expected, default=-1)
        key, value = torch.randn(1, 2, len(added), 3), torch.randn(1, len(added), 5)
        rows.put(torch.tensor(added, dtype=torch.int64), key, value, length=max([1, *added]) + 1, ordered=ordered)
        expected |= {position: (key[:, :, i], value[:, i]) for i, position in enumerate(added)}
        gone = dice.sample(sorted(expected), dice.randint(0, len(expected) // 2))
        if gone:
            taken = rows.take(torch.tensor(gone))
            assert torch.equal(taken[0], torch.stack([expected[position][0] for position in gone], 2))
            for position in gone:
                del expected[position]
        assert rows.positions.tolist() == sorted(expected) and rows.count == len(expected)
        for order in (sorted(expected), dice.sample(sorted(expected), len(expected) // 2)):
            if order:
                found = rows.get(torch.tensor(order))
                assert torch.equal(found[0], torch.stack([expected[position][0] for position in order], 2))
                assert torch.equal(found[1], torch.stack([expected[position][1] for position in order], 1))


def test_rows_in_order_are_read_without_a_copy():
    rows = Rows()
    rows.put(torch.arange(5), torch.randn(1, 5, 3), length=5)
    rows.put(torch.arange(5, 7), torch.randn(1, 2, 3), length=7)
    (found,) = rows.get(torch.arange(7))
    assert found.data_ptr() == rows.buffers[0].data_ptr()


def test_positions_beyond_all_that_came_are_not_here():
    """In decoding, tokens pass a layer by whose waiting rows were filled by the prompt alone."""
    rows = Rows()
    rows.put(torch.tensor([0, 2]), torch.zeros(1, 2, 3), length=3)
    asked = torch.tensor([0, 1, 2, 66, 67, 500])  # two thirds beyond the slots that there are
    assert rows.has(asked).tolist() == [True, False, True, False, False, False]


def test_the_default_places_keep_three_fifths():
    layers = spread(30)
    assert layers == (8, 13, 19, 24)
    rates = dict.fromkeys(layers, 0.3)
    assert 0.6 < mean_keep(rates, 30) < 0.62
    assert shares({0: 0.5, 2: 0.5}, 4) == (1.0, 0.5, 0.5, 0.25)
    for count in range(1, 9):
        assert all(0 < layer < count - 1 for layer in spread(count))


def test_the_predicted_speedup_counts_linears_and_half_the_square():
    anatomy = Anatomy.of(TINY["llama"]())
    assert predicted_speedup(anatomy, {}, 100) == 1
    assert predicted_speedup(anatomy, {2: 0.5}, 100) == pytest.approx(1, abs=0.01)  # only the score is added
    linears = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64)  # of one token: query, output; key, value; feed-forward
    layer = [share * 100 * linears + 2 * 32 * (share * 100) ** 2 for share in (1, 0.5, 0.5)]
    expected = 3 * layer[0] / (sum(layer) + 2 * 32 * 100)
    assert predicted_speedup(anatomy, {0: 0.5}, 100) == pytest.approx(expected)


@pytest.mark.parametrize("groups", [1, 3])
def test_scores_are_the_last_row_of_the_attention(groups):
    query, key = torch.randn(1, 2 * groups, 5, 4), torch.randn(1, 2, 7, 4)
    whole = (query @ key.repeat_interleave(groups, 1).transpose(2, 3) * 0.3).softmax(-1)
    torch.testing.assert_close(last_token_scores(query, key, 0.3), whole[0, :, -1].mean(0))
