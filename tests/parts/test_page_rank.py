"""Weighted PageRank, copies and counts of the rule page_rank, against plain references."""

from __future__ import annotations

import numpy
import pytest
import torch

from leanformers.errors import LeanError
from leanformers.parts.page_rank import PageRank
from leanformers.parts.token_rules import Rule, make_rule


def attention(batch: int = 2, heads: int = 3, length: int = 12, sharp: float = 1.0, seed: int = 0) -> torch.Tensor:
    scores = sharp * torch.randn(batch, heads, length, length, generator=torch.Generator().manual_seed(seed))
    return scores.softmax(-1)


def keys(batch: int = 2, heads: int = 3, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, heads, length, 4, generator=torch.Generator().manual_seed(seed))


def rule(keep: float = 0.5, drop: int = 2, votes: int = 4, specials: int = 1, **settings) -> PageRank:
    return PageRank(1, specials, keep=[keep], drop=[drop], votes=[votes], **settings)


def kept(scores: torch.Tensor, count: int) -> list[list[int]]:
    return [sorted(row.topk(count).indices.tolist()) for row in scores]


@pytest.mark.parametrize("start", ["class", "uniform"])
@pytest.mark.parametrize("alive", [False, True])
def test_votes_conserve_their_sum(start, alive):
    living = torch.rand(2, 12) > 0.3 if alive else None
    for votes in (1, 5, 50):
        s = rule(start=start).page_rank(attention(), living, votes, renormalise=alive)
        torch.testing.assert_close(s.sum(-1), torch.ones(2, 3), rtol=0, atol=1e-6)
        assert living is None or not s[:, :, :][living.logical_not()[:, None].expand(-1, 3, -1)].any()


def test_many_votes_end_in_the_left_eigenvector():
    probabilities = attention().double()
    s = rule().page_rank(probabilities, None, 1000, renormalise=False).numpy()
    for batch in range(2):
        for head in range(3):
            values, vectors = numpy.linalg.eig(probabilities[batch, head].numpy().T)
            place = numpy.abs(values - 1).argmin()
            expected = numpy.real(vectors[:, place] / vectors[:, place].sum())
            numpy.testing.assert_allclose(s[batch, head], expected, atol=1e-6)


def test_votes_go_to_those_that_are_looked_at():
    """A s in place of A^T s would leave a uniform start as it is."""
    probabilities = torch.full((1, 1, 4, 4), 0.1)
    probabilities[..., 2] = 0.7
    s = rule(start="uniform").page_rank(probabilities, None, 1, renormalise=False)
    torch.testing.assert_close(s[0, 0], torch.tensor([0.1, 0.1, 0.7, 0.1]))


def test_one_vote_of_the_class_token_is_worth_the_root_of_the_length():
    probabilities = attention()
    s = rule().page_rank(probabilities, None, 1, renormalise=False)
    expected = probabilities.sum(2) + (12**0.5 - 1) * probabilities[:, :, 0]
    torch.testing.assert_close(s, expected / expected.sum(-1, keepdim=True))


def test_survivors_vote_as_on_the_graph_of_survivors():
    probabilities, alive = attention(batch=1), torch.ones(1, 12, dtype=torch.bool)
    alive[0, [2, 5, 6]] = False
    places = alive[0].nonzero().flatten()
    small = probabilities[:, :, places][:, :, :, places]
    small = small / small.sum(-1, keepdim=True)
    s = rule().importance(probabilities, alive, 7, renormalise=True)
    torch.testing.assert_close(s[:, places], rule().importance(small, None, 7, renormalise=False))


def test_padding_changes_nothing():
    """A text of 9 tokens in 12 places scores and drops as it does alone."""
    probabilities, key = attention(batch=1, length=9), keys(batch=1, length=9)
    wide = torch.zeros(1, 3, 12, 12)
    wide[:, :, :9, :9] = probabilities
    wide[:, :, 9:, 0] = 1.0  # what padding looks at counts for nothing
    wide_key = torch.cat([key, torch.randn(1, 3, 3, 4)], dim=2)
    real = torch.arange(12)[None] < 9
    for settings in ({}, {"keep_last": True}, {"keep": 1.0}, {"drop": 0}, {"drop": 50}):
        alone = rule(**settings).scores(0, probabilities, key, None)
        padded = rule(**settings).scores(0, wide, wide_key, real)
        assert torch.isneginf(padded[:, 9:]).all()
        torch.testing.assert_close(padded[:, :9], alone)


def test_flat_and_peaked_heads_are_left_out():
    flat, peaked = torch.full((1, 1, 12, 12), 1 / 12), torch.zeros(1, 1, 12, 12)
    peaked[..., 3] = 1.0
    telling = attention(batch=1, heads=1)
    among = torch.cat([flat, telling, peaked], dim=1)
    found = rule(start="uniform").importance(among, None, 3, renormalise=False)
    torch.testing.assert_close(found, rule(start="uniform").importance(telling, None, 3, renormalise=False))
    both = torch.cat([flat, peaked], dim=1)  # none passes: all count, and nothing is 0 / 0
    assert rule(start="uniform").importance(both, None, 3, renormalise=False).isfinite().all()
    every = rule(start="uniform", variance=None).importance(among, None, 3, renormalise=False)
    by_head = rule(start="uniform").page_rank(among, None, 3, renormalise=False)
    torch.testing.assert_close(every, by_head.square().mean(1).sqrt())


def test_copies_are_dropped_from_the_less_important_half_alone():
    for seed in range(5):
        probabilities, key = attention(seed=seed), keys(seed=seed)
        one = rule(drop=3)
        first = one.importance(probabilities, None, 1, renormalise=False)
        gone = one.copies(0, first, key, None)
        assert gone.sum(1).tolist() == [3, 3] and not gone[:, 0].any()
        order = first[:, 1:].argsort(dim=1, descending=True) + 1
        for row in range(2):
            assert not gone[row, order[row, :6]].any()  # 11 are free: 6 better, 5 worse


def test_of_two_copies_one_goes():
    key = keys(batch=1)
    first = torch.arange(12.0)[None] / 66
    key[:, :, 2] = 3 * key[:, :, 9]  # 2 is of the worse half, 9 of the better; length plays no part
    gone = rule(drop=1).copies(0, first, key, None)
    assert gone.nonzero().tolist() == [[0, 2]]


def test_permuted_tokens_are_scored_permuted():
    probabilities, key = attention(), keys()
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(11)])
    scores = rule().scores(0, probabilities, key, None)
    again = rule().scores(0, probabilities[:, :, order][:, :, :, order], key[:, :, order], None)
    torch.testing.assert_close(again, scores[:, order])
    assert kept(again, 5) == [sorted(order.argsort()[row].tolist()) for row in torch.tensor(kept(scores, 5))]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("keep", "drop"), [(0.9, 10), (0.5, 0), (1.0, 3), (0.05, 100)])
def test_counts_of_numbers_and_tensors_agree(keep, drop, last):
    one = rule(keep, drop, specials=2, keep_last=last)
    lengths = torch.arange(0, 200)
    found = one.count(0, lengths, lengths)
    assert found.tolist() == [one.count(0, int(length), int(length)) for length in lengths]
    assert (found.diff() >= 0).all() and (found <= lengths).all()
    protected = 2 + last
    survivors = 197 - protected - min(drop, (197 - protected) // 2)
    assert found[197] == protected + -(-round(keep * 100) * survivors // 100)


def test_a_rule_with_scores_of_its_own_leaves_the_kernel():
    class Other(PageRank):
        def scores(self, place, probabilities, key, real):
            return probabilities[:, :, 0].mean(1)

    class Same(PageRank):
        pass

    assert Other.attended is Rule.attended and Same.attended is PageRank.attended is not Rule.attended


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": [0.5, 0.5]}, "keep has 2 values for 1 layers"),
        ({"keep": [0.0]}, "keep holds 0.0: give a number from 1e-09 to 1"),
        ({"drop": [0.5]}, "drop holds 0.5: give a whole number"),
        ({"votes": [0]}, "votes holds 0"),
        ({"start": "cls"}, "start is 'cls'"),
        ({"variance": [0.7, 0.1]}, "variance is"),
        ({"merge": True}, "does not take"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(LeanError, match=words):
        make_rule("page_rank", 1, 1, {"keep": [0.5], "drop": [1], "votes": [1], **settings})
    with pytest.raises(LeanError, match="no rule 'rank'"):
        make_rule("rank", 1, 1, {})
