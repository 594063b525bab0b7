"""Zero-TPrune's kernels: they choose as the plain rule does, whatever the sizes, and give way where they cannot run."""

from __future__ import annotations

import pytest
import torch
from interpreting import interpret, needs_triton

from families import TINY, inputs, outputs
from leanformers.kernels import token_votes
from leanformers.parts import token_reducers
from leanformers.parts.page_rank import PageRank
from leanformers.parts.token_elimination import Received
from leanformers.parts.token_reducers import reduction
from leanformers.parts.token_rules import lowest
from leanformers.surgery import ReduceTokens, apply

interpret()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# batch, heads, key heads, length, head_dim, whether padded
SIZES = {
    "short": (2, 3, 3, 12, 16, False),
    "grouped, padded": (3, 4, 2, 37, 24, True),
    "more than one tile": (2, 2, 1, 70, 16, False),
    "one token": (1, 2, 2, 1, 16, False),
}


def draw(case, dtype=torch.float32, seed=0):
    """Query, key, their attention probabilities in float32, and which tokens are real."""
    batch, heads, groups, length, head_dim, padded = SIZES[case]
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, length, heads, head_dim, generator=random).to(DEVICE, dtype).transpose(1, 2)
    key = torch.randn(batch, length, groups, head_dim, generator=random).to(DEVICE, dtype).transpose(1, 2)
    real = None
    if padded:
        counts = torch.randint(4, length, (batch, 1), generator=random)
        real = (torch.arange(length)[None] < counts).to(DEVICE)
    wide = key.repeat_interleave(heads // groups, dim=1).float()
    scores = query.float() @ wide.transpose(-1, -2) * 0.3
    if real is not None:
        scores = scores.masked_fill(real.logical_not()[:, None, None], float("-inf"))
    return query, key, scores.softmax(-1), real


def rule(keep=0.6, drop=3, votes=4, specials=1, **settings) -> PageRank:
    return PageRank(1, specials, keep=[keep], drop=[drop], votes=[votes], **settings)


def some(real, length, batch):
    alive = (torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) > 0.3).to(DEVICE)
    alive[:, 0] = True
    return alive if real is None else alive & real


@needs_triton
@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize(("rounds", "favoured"), [(1, True), (1, False), (6, True)])
def test_votes_are_weighted_page_rank(case, rounds, favoured):
    query, key, probabilities, real = draw(case)
    plain = rule(start="class" if favoured else "uniform")
    options = {"rounds": rounds, "specials": 1, "scaling": 0.3, "favoured": favoured}
    alive = some(real, query.shape[2], query.shape[0])
    for mask, renormalise in ((real, False), (alive, True)):
        found = token_votes._votes(query, key, mask, *options.values())
        exact = plain.page_rank(probabilities, mask, rounds, renormalise=renormalise)
        torch.testing.assert_close(found, exact, rtol=2e-3 if rounds > 1 else 1e-5, atol=1e-6)
        torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), rtol=0, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])])  # not interpreted
def test_votes_in_half_precision(dtype):
    query, key, probabilities, _ = draw("more than one tile", dtype)
    found = token_votes.votes(query, key, None, rounds=5, specials=2, scaling=0.3, favoured=True)
    exact = rule(specials=2).page_rank(probabilities, None, 5, renormalise=False)
    torch.testing.assert_close(found, exact, rtol=5e-3, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize(
    "settings", [{}, {"drop": 50}, {"drop": 1, "keep_last": True}, {"variance": None, "specials": 2}]
)
def test_copies_and_scores_are_the_rules(case, settings):
    query, key, probabilities, real = draw(case)
    plain = rule(**settings)
    bounds = {"variance": plain.variance, "keep_last": plain.keep_last}
    first = token_votes.votes(query, key, real, rounds=1, specials=plain.specials, scaling=0.3, favoured=True)
    alive = token_votes.copies(first, key, real, drop=plain.drop[0], specials=plain.specials, **bounds)
    importance = plain.importance(probabilities, real, 1, renormalise=False)
    gone = plain.copies(0, importance, key, real)
    assert torch.equal(alive, gone.logical_not() if real is None else real & gone.logical_not())
    second = token_votes.votes(query, key, alive, rounds=1, specials=plain.specials, scaling=0.3, favoured=True)
    found = token_votes.joined(second, alive, real, **bounds)
    exact = lowest(alive, plain.importance(probabilities, alive, 1, renormalise=True))
    if plain.keep_last:
        last = (query.shape[2] if real is None else real.sum(-1)) - 1
        exact[torch.arange(len(exact)), last] = float("inf")
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("size", [1, 9, 40])
def test_top_is_a_stable_sort(size, counted):
    """Equal, negative, infinite and tiny scores among them."""
    scores = torch.randint(-3, 4, (4, 40), generator=torch.Generator().manual_seed(0)).float()
    scores[0, 5:9], scores[1, ::3], scores[2] = float("-inf"), 1e-40, -0.0
    counts = torch.tensor([0, 1, 7, size])[:, None].clamp(max=size)[:, 0] if counted else None
    found = token_votes.top(scores.to(DEVICE), size, 2, None if counts is None else counts.to(DEVICE)).cpu()
    exact = token_reducers._top(scores, size, 2, counts)
    assert found.dtype == torch.int64 and torch.equal(found, exact)


@pytest.fixture
def with_kernels(monkeypatch):
    """As on a GPU, whatever there is."""
    monkeypatch.setattr(token_votes, "fits", lambda query, key: True)
    monkeypatch.setattr(token_votes, "ranks", lambda scores: True)


PRUNED = {"keep": [0.6, 0.7], "drop": [2, 0], "votes": [3, 1]}
RECEIVED = {"curve": [0.7, 0.4], "costs": [[4096, 64, 4096]] * 2, "length": 17, "speedup": 1.3}


def both(family, name, settings, monkeypatch, compiled=False):
    """Outputs and kept tokens of a tiny model by the plain rule and by the kernels."""
    model = apply(TINY[family](head="classification"), ReduceTokens(layers=(0, 1), rule=name, settings=settings))
    model = model.eval().to(DEVICE)
    batch = {key: value.to(DEVICE) for key, value in inputs(model, batch=2, length=19, padded=True).items()}
    found = []
    for takes in (False, True):
        monkeypatch.setattr(token_votes, "fits", lambda query, key, takes=takes: takes)
        monkeypatch.setattr(token_votes, "ranks", lambda scores, takes=takes: takes)
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled and takes else model
        answer = outputs(call, batch)
        found.append((answer, [left.index for _, left in sorted(reduction(model).left.items())]))
    return found


@needs_triton
@pytest.mark.parametrize("family", ["vit", "deit", "bert"])
@pytest.mark.parametrize(("name", "settings"), [("page_rank", PRUNED), ("received", RECEIVED)])
def test_models_prune_alike_by_kernels_and_by_the_plain_rule(family, name, settings, monkeypatch):
    (plain, kept), (fast, chosen) = both(family, name, settings, monkeypatch)
    assert len(kept) == 2 and all(torch.equal(one, other) for one, other in zip(kept, chosen, strict=True))
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


@needs_triton
def test_kernels_are_operations_of_a_compiled_model(monkeypatch):
    (plain, _), (fast, _) = both("vit", "page_rank", PRUNED, monkeypatch, compiled=True)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


@needs_triton
def test_gradients_pass_what_stays(with_kernels):
    model = apply(TINY["vit"](), ReduceTokens(layers=(0, 1), rule="page_rank", settings=PRUNED)).to(DEVICE)
    batch = {key: value.to(DEVICE) for key, value in inputs(model, batch=2).items()}
    model(**batch)[0].square().sum().backward()
    first = model.vit.layers[0] if hasattr(model.vit, "layers") else model.vit.encoder.layer[0]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in first.parameters())


def test_what_does_not_fit_is_left_to_the_plain_rule():
    query = torch.randn(1, 2, 8, 16)
    assert not token_votes.fits(query, query) and not token_votes.ranks(torch.randn(1, 8))
    assert rule().attended(0, query, query, 0.25, None) is None
    settings = {"curve": [0.7], "costs": [[4096, 64, 4096]], "length": 17}
    assert Received(1, 1, **settings).attended(0, query, query, 0.25, None) is None
    if DEVICE == "cuda":
        long = torch.randn(1, 2, token_votes.MOST + 1, 16, device=DEVICE)
        assert not token_votes.fits(long, long) and token_votes.fits(long[:, :, 1:], long[:, :, 1:])
        assert not token_votes.fits(long.double(), long.double())
