"""Scores of tokens by the attention that they receive, and the ACC of a layer."""

from __future__ import annotations

import pytest
import torch

from families import TINY, inputs, outputs
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.parts import attention_received
from leanformers.parts.attention_received import contribution, received, watched


def draw(length: int = 9, heads: int = 4, key_heads: int = 4, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(3, heads, length, 8, generator=random)
    key = torch.randn(3, key_heads, length, 8, generator=random)
    real = torch.arange(length)[None] < torch.tensor([[length], [max(1, length // 2)], [1]])
    return query, key, real


def test_scores_are_the_column_means_of_the_probabilities_over_real_queries():
    query, key, real = draw()
    scores = received(query, key, scaling=0.5, real=real)
    for row in range(3):
        count = int(real[row].sum())
        probabilities = (query[row, :, :count] @ key[row, :, :count].mT * 0.5).softmax(-1)  # [heads, count, count]
        torch.testing.assert_close(scores[row, :count], probabilities.mean((0, 1)))
        assert (scores[row, count:] == 0).all()
    torch.testing.assert_close(scores.sum(1), torch.ones(3))


@pytest.mark.parametrize("length", [1, 7, 16])
def test_queries_in_parts_give_the_same_scores(length, monkeypatch):
    query, key, real = draw(length)
    whole = received(query, key, scaling=0.3, real=real)
    monkeypatch.setattr(attention_received, "_ROWS", 3)
    torch.testing.assert_close(received(query, key, scaling=0.3, real=real), whole)


def test_grouped_keys_and_a_bias_count():
    query, key, _ = draw(key_heads=2)
    bias = torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(1))
    probabilities = (query @ key.repeat_interleave(2, 1).mT * 0.5 + bias).softmax(-1)
    torch.testing.assert_close(received(query, key, scaling=0.5, position_bias=bias), probabilities.mean((1, 2)))


def test_the_contribution_is_one_where_attention_is_even_and_small_where_few_receive_it():
    even = torch.full((1, 8), 1 / 8)
    assert contribution(even).item() == pytest.approx(1.0)
    one = torch.tensor([[1.0, 0, 0, 0, 0]])
    assert contribution(one).item() == 0.0
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.3, 0.2, 0.0]])
    real = torch.tensor([[True] * 4, [True] * 3 + [False]])
    torch.testing.assert_close(contribution(scores, real), torch.tensor([4 * 0.25, 3 * 0.3]))


@pytest.mark.parametrize("family", ["bert", "roberta", "vit", "distilbert"])
def test_watching_changes_nothing_and_sees_every_layer(family):
    model = TINY[family]()
    batch = inputs(model, padded=True)
    before, name = outputs(model, batch), model.config._attn_implementation
    anatomy = Anatomy.of(model)
    with watched(anatomy) as watchers:
        torch.testing.assert_close(outputs(model, batch), before, rtol=1e-4, atol=1e-5)
    assert all(0 < watcher.mean <= 1 for watcher in watchers) and len(watchers) == 3
    assert watchers[0].texts == 2
    assert model.config._attn_implementation == name and torch.equal(outputs(model, batch), before)


def test_a_model_that_attends_itself_is_refused():
    with pytest.raises(LeanError, match="computes its attention itself"), watched(Anatomy.of(TINY["mpnet"]())):
        pass


def test_no_text_is_said():
    with watched(Anatomy.of(TINY["bert"]())) as watchers, pytest.raises(LeanError, match="No text"):
        _ = watchers[0].mean
