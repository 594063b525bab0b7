"""Query, key and value in one product: the same parameters, the same values, and each for itself where that is not so."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from drawing import KINDS, draw
from padded import EXACT, LENGTHS, check_states, ragged, states
from torch import nn

from families import TINY
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.packing import pack
from leanformers.packing.together import Member, Together, end_to_end, join, lay, look, products
from leanformers.surgery import apply

FAMILIES = ("bert", "roberta", "distilbert", "electra", "mpnet")


def members(model):
    return [module for module in model.modules() if isinstance(module, Member)]


def three(sizes=(8, 8, 8), bias=True):
    return [nn.Linear(8, size, bias=bias) for size in sizes]


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_separate_products(family):
    model = TINY[family](head="base")
    batch, before = ragged(model), None
    before = states(model, batch)
    parameters = list(model.parameters())
    packed = pack(model)
    assert join(Anatomy.of(packed)) == len(Anatomy.of(model).layers)
    assert all(member.together.laid for member in members(packed))
    assert torch.equal(states(model, batch), before)
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    assert packed.state_dict().keys() == model.state_dict().keys()
    check_states(model, packed, batch)
    assert not any(member.together._outputs.count(None) < 3 for member in members(packed))  # nothing is kept
    with torch.no_grad():
        Anatomy.of(model).layers[0].attention.key.module.weight.mul_(2)
    check_states(model, packed, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_edited_models_are_joined_where_they_can_be(kind):
    model = TINY["bert"](head="base")
    drawn = draw(model, kind, 1)
    if drawn is None or kind in ("swap_attention", "reduce_tokens"):
        pytest.skip("nothing to pack")
    apply(model, drawn[0], **drawn[1])
    packed = pack(model)
    join(Anatomy.of(packed))
    check_states(model, packed, ragged(model))


def test_compiled_it_is_one_product_in_one_graph_for_all_sizes():
    model = TINY["bert"](head="base")
    packed, graphs = pack(model), []
    join(Anatomy.of(packed))

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    run = functools.partial(packed.packer._run_stock, packed)
    packed.packer._compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for lengths in (LENGTHS, (3, 8, 2), (9, 7, 6, 2)):
        batch = ragged(model, lengths, max(lengths))
        mask = batch["attention_mask"].bool()
        torch.testing.assert_close(states(packed, batch)[mask], states(model, batch)[mask], **EXACT)
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("leanformers.products" in target for target in targets) == len(Anatomy.of(model).layers)


def test_copies_and_moved_models_compute_each_for_itself():
    model = TINY["bert"](head="base")
    packed = pack(model)
    join(Anatomy.of(packed))
    copied = copy.deepcopy(packed)
    check_states(model, copied, ragged(model))
    assert not any(member.together.laid for member in members(copied))
    packed.double().float()
    look(packed)
    assert not any(member.together.laid for member in members(packed))
    check_states(model, packed, ragged(model))


def test_saved_weights_are_whole_and_stock(tmp_path):
    model = TINY["bert"](head="base")
    packed = pack(model)
    join(Anatomy.of(packed))
    for one in (model, packed):
        one.save_pretrained(tmp_path / "saved")
        again = type(model).from_pretrained(tmp_path / "saved")
        assert torch.equal(states(again, ragged(model)), states(model, ragged(model)))


def test_gradients_flow_through_each():
    model = TINY["bert"](head="base")
    packed, batch = pack(model), ragged(model)
    join(Anatomy.of(packed))
    weight = members(packed)[1].weight
    found = torch.autograd.grad(packed(**batch).last_hidden_state.square().sum(), weight)[0]
    mask = batch["attention_mask"].bool()
    asked = torch.autograd.grad(model(**batch).last_hidden_state[mask].square().sum(), weight)[0]
    torch.testing.assert_close(found, asked, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(8, 8, 8), (16, 8, 8), (4, 12)])
def test_linears_laid_end_to_end_are_what_they_were(sizes, bias):
    linears, x = three(sizes, bias), torch.randn(2, 5, 8)
    before = [one(x) for one in linears]
    assert lay(linears)
    whole = end_to_end([one.weight for one in linears])
    assert whole.shape == (sum(sizes), 8) and whole.data_ptr() == linears[0].weight.data_ptr()
    assert lay(linears) and end_to_end([one.weight for one in linears]).data_ptr() == whole.data_ptr()
    assert all(torch.equal(one(x), was) for one, was in zip(linears, before, strict=True))
    weights, biases = [one.weight for one in linears], [one.bias for one in linears] if bias else []
    torch.testing.assert_close(products(x, weights, biases), torch.cat(before, -1))
    torch.testing.assert_close(products(x, [w.clone() for w in weights], biases), torch.cat(before, -1))


@torch.no_grad()
def test_asked_twice_or_in_any_order_each_gives_its_own():
    linears, x = three((8, 4, 4)), torch.randn(3, 8)
    before = [one(x) for one in linears]
    assert lay(linears)
    together = Together([Member.of(one, place) for place, one in enumerate(linears)])
    for member in together.members:
        member.together = together
    together.look()
    for order in ((2, 0, 1), (0, 0, 1, 2), (1,), (0, 1, 2)):
        for place in order:
            torch.testing.assert_close(together.members[place](x), before[place])
        x = x.clone()


def test_what_others_hold_is_left_alone():
    one, two, other = three()
    assert not lay([one, two, nn.Linear(8, 8, bias=False)])
    assert not lay([one, two, nn.Linear(4, 8)])
    assert not lay([one, two, one])
    assert not lay([one, two, nn.Linear(8, 8).double()])
    assert not lay([one, two, nn.Linear(8, 3)])  # the next one would stand at an odd place
    whole = torch.randn(32, 8)
    other.weight.data = whole[8:16]
    assert not lay([one, two, other])
    assert other.weight.data_ptr() == whole[8:16].data_ptr()
    assert end_to_end([one.weight, two.weight]) is None


def test_it_is_done_on_a_gpu_alone():
    packed = pack(TINY["bert"](), graphs=True)
    assert not members(packed)
    with pytest.raises(LeanError, match="packed already"):
        pack(packed)
