"""The identities of the card essential-sparsity."""

from __future__ import annotations

import pytest
import torch
from subjects import BOTH, encoder, outputs

from leanformers.methods import get
from leanformers.methods.compress.essential_sparsity import keep_n_of_m
from leanformers.methods.pruning import drop_smallest, global_counts, prunable
from leanformers.parts import MaskedLinear


def masked(make=encoder, **settings):
    subject = make()
    get("essential-sparsity").build(settings)(subject)
    return subject


def zeros(anatomy) -> list[tuple[str, int, int]]:
    """Path, zeros and weights of every block linear."""
    return [(path, int((weight == 0).sum()), weight.numel()) for path, weight in prunable(anatomy)]


def masks(subject) -> dict[str, torch.Tensor]:
    anatomy = subject.anatomy
    return {path: anatomy.module(path).mask for path in anatomy.roles}


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_no_sparsity_changes_nothing(make):
    assert torch.equal(outputs(masked(make, sparsity=0.0)), outputs(make()))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.9])
def test_exactly_the_asked_share_is_zero(scope, sparsity):
    counted = zeros(masked(sparsity=sparsity, scope=scope).anatomy)
    if scope == "layer":
        assert all(zero == round(sparsity * total) for _, zero, total in counted)
    else:
        total = sum(total for _, _, total in counted)
        assert sum(zero for _, zero, _ in counted) == round(sparsity * total)


def test_equal_magnitudes_are_still_counted_exactly():
    subject = encoder()
    with torch.no_grad():
        for _, weight in prunable(subject.anatomy):
            weight.copy_(weight.sign() * (weight.abs() * 100).ceil() / 100)  # a coarse grid: many ties
    get("essential-sparsity").build({"sparsity": 0.25})(subject)
    counted = zeros(subject.anatomy)
    assert sum(zero for _, zero, _ in counted) == round(0.25 * sum(total for *_, total in counted))


def test_the_pool_is_one_threshold():
    scores = {"a": torch.tensor([0.1, 0.9, 0.5]), "b": torch.tensor([0.2, 0.3, 0.5])}
    assert global_counts(lambda: scores.items(), 3) == {"a": 1, "b": 2}
    assert global_counts(lambda: scores.items(), 4) == {"a": 2, "b": 2}
    assert global_counts(lambda: scores.items(), 0) == {"a": 0, "b": 0}
    assert drop_smallest(torch.tensor([[3.0, 1.0, 1.0]]), 1).tolist() == [[True, False, True]]


@pytest.mark.parametrize("total", [0, 1, 50, 119, 120])
@pytest.mark.parametrize("grid", [None, 4])  # None: no ties; 4: many
def test_the_threshold_is_that_of_a_sorted_pool(total, grid):
    generator = torch.Generator().manual_seed(total)
    scores = {name: torch.rand(6, 10, generator=generator) ** 4 for name in "ab"}
    if grid:
        scores = {name: (score * grid).round() / grid for name, score in scores.items()}
    pool = torch.cat([score.flatten() for score in scores.values()])
    gone = pool.argsort(stable=True)[:total]  # equal ones by position
    calls = []
    counts = global_counts(lambda: calls.append(1) or scores.items(), total)
    assert counts == {"a": int((gone < 60).sum()), "b": int((gone >= 60).sum())}
    assert len(calls) == 3  # each makes the scores of the whole model anew
    for name, score in scores.items():
        wanted = torch.ones(60, dtype=torch.bool)
        wanted[score.flatten().argsort(stable=True)[: counts[name]]] = False
        assert torch.equal(drop_smallest(score, counts[name]), wanted.view(6, 10))


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8"])
def test_n_of_m_leaves_exactly_n(pattern):
    kept, group = map(int, pattern.split(":"))
    for mask in masks(masked(pattern=pattern)).values():
        assert (mask.view(-1, group).sum(-1) == kept).all()


def test_n_of_m_keeps_the_largest_of_each_group_of_inputs():
    score = torch.tensor([[1.0, 4.0, 2.0, 3.0, 8.0, 5.0, 6.0, 7.0]])
    assert keep_n_of_m(score, "2:4").tolist() == [[False, True, False, True, True, False, False, True]]


def test_masks_are_nested():
    small, large = masks(masked(sparsity=0.3)), masks(masked(sparsity=0.6))
    assert all((small[path] | ~large[path]).all() for path in small)


def test_survivors_and_the_rest_of_the_model_are_untouched():
    before, subject = encoder(), masked(sparsity=0.5)
    for path, old in prunable(before.anatomy):
        module = subject.anatomy.module(path)
        assert isinstance(module, MaskedLinear)
        assert torch.equal(module.weight[module.mask], old[module.mask]) and (module.weight[~module.mask] == 0).all()
    inside = set(subject.anatomy.roles)
    for name, tensor in before.model.state_dict().items():
        if name.removeprefix("bert.").removesuffix(".weight") not in inside:
            assert torch.equal(tensor, subject.model.state_dict()[name]), name


def test_zeros_stay_zero_after_training_saving_and_loading(tmp_path):
    subject = masked(sparsity=0.5)
    before = masks(subject)
    subject.train(0.5, 1e-2, limit=64)
    subject.model.save_pretrained(tmp_path)
    again = type(subject.model).from_pretrained(tmp_path)
    for path, mask in before.items():
        weight = again.bert.get_submodule(path).weight
        assert (weight[~mask] == 0).all() and (weight[mask] != 0).float().mean() > 0.99


def test_random_masks_are_another_choice_of_as_many():
    magnitude, random = masks(masked(sparsity=0.5)), masks(masked(sparsity=0.5, scores="random"))
    assert any(not torch.equal(magnitude[path], random[path]) for path in magnitude)
    assert sum(m.sum() for m in magnitude.values()) == sum(m.sum() for m in random.values())


def test_a_pattern_that_does_not_fit_is_refused_before_any_work():
    subject = encoder(intermediate_size=66)
    reason = get("essential-sparsity").unsuitable(subject.anatomy, subject.task, {"pattern": "2:4"})
    assert reason is not None and "66" in reason
