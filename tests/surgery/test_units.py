"""Costs of units against the tensors' shapes, and the choice of units by rank."""

from __future__ import annotations

import pytest
import torch

from families import ENCODER_DECODERS, TINY, family
from leanformers.anatomy import Anatomy, count_parameters
from leanformers.surgery import DropSublayers, FactoriseLinear, KeepHeads, KeepNeurons, apply
from leanformers.surgery.units import Limits, UnitCosts, keep_by_rank, least_cost

ONE_STACK = [name for name in TINY if name not in ENCODER_DECODERS]


def layer_parameters(model) -> int:
    return sum(count_parameters(layer.module) for layer in Anatomy.of(model).layers)


def sizes(model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    anatomy = Anatomy.of(model)
    heads = [layer.attention.num_key_value_heads for layer in anatomy.layers]
    neurons = [layer.feed_forward.intermediate_size for layer in anatomy.layers]
    return torch.tensor(anatomy.hidden_size), torch.tensor(heads), torch.tensor(neurons)


@pytest.mark.parametrize("name", ONE_STACK)
def test_the_formula_counts_what_the_tensors_hold(name):
    model = TINY[name]()
    costs, flops = UnitCosts(Anatomy.of(model)), UnitCosts(Anatomy.of(model), "flops", length=9)
    assert costs.whole == layer_parameters(model) and flops.whole == Anatomy.of(model).layer_flops(9)
    layer = Anatomy.of(model).layers[1]
    apply(model, KeepNeurons(path=layer.feed_forward.path, size=5), keep=torch.arange(5))
    if not family(name).shared_position_bias:
        apply(model, KeepHeads(path=layer.attention.path, size=1), keep=torch.tensor([1]))
    assert float(costs(*sizes(model))) == layer_parameters(model)
    assert float(flops(*sizes(model))) == Anatomy.of(model).layer_flops(9)


def test_low_rank_linears_and_dropped_sub_layers_count_as_they_are():
    model = TINY["llama"]()
    apply(model, FactoriseLinear(path="layers.0.mlp.down_proj", rank=4))
    apply(model, FactoriseLinear(path="layers.1.self_attn.q_proj", rank=3))
    apply(model, DropSublayers(path="layers.2", sublayers=("attention",)))
    costs = UnitCosts(Anatomy.of(model))
    assert costs.whole == layer_parameters(model)
    apply(model, KeepNeurons(path="layers.0.mlp", size=5), keep=torch.arange(5))
    apply(model, KeepHeads(path="layers.1.self_attn", size=1), keep=torch.tensor([0]))
    assert float(costs(*sizes(model))) == layer_parameters(model)


def test_embeddings_count_where_they_are_asked_for():
    model = TINY["llama"](tie_word_embeddings=False)
    costs = UnitCosts(Anatomy.of(model), embeddings=True)
    final = model.model.norm.weight.numel()  # of no layer
    assert costs.whole == count_parameters(model) - final
    tied = TINY["llama"](tie_word_embeddings=True)
    assert UnitCosts(Anatomy.of(tied), embeddings=True).whole == count_parameters(tied) - final


def ranked(costs: UnitCosts, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    heads = [torch.randn(size, generator=random) for size in costs.heads]
    neurons = [torch.randn(size, generator=random) for size in costs.neurons]
    return torch.randn(costs.hidden_size, generator=random), heads, neurons


def cost(costs: UnitCosts, masks) -> float:
    hidden, heads, neurons = masks
    width = torch.tensor(costs.hidden_size) if hidden is None else hidden.sum()
    groups = torch.stack([mask.sum() for mask in heads]) if heads else torch.tensor(costs.heads)
    return float(costs(width, groups, torch.stack([mask.sum() for mask in neurons])))


@pytest.mark.parametrize("measure", ["parameters", "flops"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("which", ["all", "no hidden", "neurons"])
def test_the_budget_is_met_and_used_up_to_one_neuron(measure, share, which):
    costs = UnitCosts(Anatomy.of(TINY["llama"]()), measure)
    hidden, heads, neurons = ranked(costs)
    hidden, heads = (None if which != "all" else hidden), ([] if which == "neurons" else heads)
    limits = Limits(hidden=8)
    least = least_cost(costs, limits, hidden=hidden is not None, heads=bool(heads))
    allowed = least + share * (costs.whole - least)
    masks = keep_by_rank(costs, allowed, hidden, heads, neurons, limits)
    assert cost(costs, masks) <= allowed
    short = next((index for index, mask in enumerate(masks[2]) if not mask.all()), None)
    if short is not None:
        masks[2][short][masks[2][short].logical_not().nonzero()[0]] = True
        assert cost(costs, masks) > allowed


def test_the_best_of_all_stay_and_each_layer_keeps_something():
    costs = UnitCosts(Anatomy.of(TINY["llama"]()))
    hidden, heads, neurons = ranked(costs)
    neurons[1] -= 100.0
    heads[2] -= 100.0
    kept = keep_by_rank(costs, 0.4 * costs.whole, hidden, heads, neurons, Limits(hidden=8))
    assert kept[2][1].sum() == 1 and kept[2][1][neurons[1].argmax()]
    assert kept[1][2].sum() == 1 and kept[1][2][heads[2].argmax()]
    for scores, mask in zip([hidden, *heads, *neurons], [kept[0], *kept[1], *kept[2]], strict=True):
        assert mask.all() or scores[mask].min() >= scores[~mask].max()
    lowest = min(scores[mask].min() for scores, mask in zip(neurons, kept[2], strict=True) if mask.sum() > 1)
    gone = max(scores[~mask].max() for scores, mask in zip(neurons, kept[2], strict=True) if not mask.all())
    assert lowest >= gone  # one threshold over the layers


def test_a_budget_below_the_least_keeps_the_least():
    costs = UnitCosts(Anatomy.of(TINY["llama"]()))
    limits = Limits(hidden=8)
    kept = keep_by_rank(costs, 0.0, *ranked(costs), limits)
    assert cost(costs, kept) == least_cost(costs, limits, hidden=True, heads=True)
    assert least_cost(costs, limits, hidden=False, heads=False) > cost(costs, kept)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_widths_are_rounded_to_a_multiple(share):
    costs = UnitCosts(Anatomy.of(TINY["llama"](intermediate_size=72)))
    hidden, _, neurons = masks = keep_by_rank(costs, share * costs.whole, *ranked(costs), Limits(hidden=8, multiple=16))
    assert int(hidden.sum()) in (16, 32) and all(int(mask.sum()) in (16, 32, 48, 64, 72) for mask in neurons)
    assert cost(costs, masks) <= share * costs.whole


@pytest.mark.parametrize("name", ["llama", "bert", "phi3"])
@pytest.mark.parametrize("measure", ["parameters", "flops"])
def test_the_cost_of_one_unit_is_a_difference(name, measure):
    costs = UnitCosts(Anatomy.of(TINY[name]()), measure, length=9)
    whole = torch.tensor(costs.hidden_size), torch.tensor(costs.heads), torch.tensor(costs.neurons)
    for index, found in enumerate(costs.of_units()):
        fewer = list(whole)
        fewer[index] = whole[index] - 1  # of each layer
        gone = costs.whole - float(costs(*fewer))
        assert found == pytest.approx(gone / (len(costs.heads) if index else 1))


def test_equal_scores_go_in_order_of_place():
    costs = UnitCosts(Anatomy.of(TINY["llama"]()))
    flat = [[torch.zeros(size) for size in kind] for kind in (costs.heads, costs.neurons)]
    one = keep_by_rank(costs, 0.5 * costs.whole, None, *flat, Limits())
    assert all(mask.tolist() == sorted(mask.tolist(), reverse=True) for mask in [*one[1], *one[2]])
