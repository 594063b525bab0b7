import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from leanformers.tasks.metrics import accuracy, macro_f1, ndcg, neighbours, ranks, spearman

sklearn = pytest.importorskip("sklearn.metrics")


def test_ndcg_by_hand():
    bodies = torch.eye(3)
    queries = torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.5, 0.0], [1.0, 0.5, 0.0]])  # right bodies rank 1, 2, 3
    assert ndcg(queries, bodies) == pytest.approx((1 + 1 / math.log2(3) + 1 / 2) / 3)
    assert ndcg(queries, bodies, k=2) == pytest.approx((1 + 1 / math.log2(3)) / 3)
    assert ndcg(queries, bodies, relevant=torch.tensor([0, 0, 0])) == 1


def test_ndcg_agrees_with_sklearn():
    generator = torch.Generator().manual_seed(0)
    bodies = F.normalize(torch.randn(300, 16, generator=generator), dim=-1)
    queries = F.normalize(bodies + 0.8 * torch.randn(300, 16, generator=generator), dim=-1)
    theirs = sklearn.ndcg_score(np.eye(300), (queries @ bodies.T).numpy(), k=10)
    assert ndcg(queries, bodies) == pytest.approx(theirs, abs=1e-9)
    assert 0.1 < theirs < 0.9


def test_a_collapsed_model_earns_nothing():
    assert ndcg(torch.ones(50, 4), torch.ones(50, 4)) == 0


def test_ndcg_does_not_depend_on_the_chunk(monkeypatch):
    queries, bodies = torch.randn(100, 8), torch.randn(100, 8)
    whole = ndcg(queries, bodies)
    monkeypatch.setattr("leanformers.tasks.metrics._CHUNK", 7)
    assert ndcg(queries, bodies) == pytest.approx(whole)
    assert neighbours(queries, queries) == 1


def test_neighbours_counts_shared_ones():
    line = torch.tensor([[1.0, 0.0], [0.99, 0.14], [0.0, 1.0], [0.14, 0.99]])
    assert neighbours(line, line, k=1) == 1
    assert neighbours(line[[0, 2, 1, 3]], line, k=1) == 0
    assert neighbours(line, line @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), k=2) == 1  # rotation changes nothing


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_f1_agrees_with_sklearn(pairs):
    predicted, labels = (torch.tensor(side) for side in zip(*pairs, strict=True))
    assert macro_f1(predicted, labels) == pytest.approx(sklearn.f1_score(labels, predicted, average="macro"))
    assert accuracy(predicted, predicted) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=40))
def test_spearman_agrees_with_scipy(pairs):
    from scipy.stats import rankdata, spearmanr

    a, b = (torch.tensor(side, dtype=torch.float) for side in zip(*pairs, strict=True))
    assert (ranks(a) + 1).tolist() == rankdata(a).tolist()
    if len(set(a.tolist())) > 1 and len(set(b.tolist())) > 1:
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    else:
        assert spearman(a, b) == 0
