"""Dense-sparse linears and the pursuit that starts them (card dsformer)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leanformers.errors import LeanError
from leanformers.parts import DenseSparseLinear
from leanformers.parts.dense_sparse import dense_sparse_bits, index_bits
from leanformers.parts.dictionary import Factors, blocks_of, factorise, pursue

from .making import linear, tokens

OUT, IN, WIDTH = 40, 24, 8


def made(rank: int = 10, nonzeros: int = 3, **options) -> DenseSparseLinear:
    old = linear()
    part = DenseSparseLinear.like(old, rank, WIDTH, nonzeros, **options)
    part.carry(old)
    return part


def product(factors: Factors) -> torch.Tensor:
    """W [out, in], atom by atom."""
    dictionary, values, indices = factors
    rows = [
        torch.cat([values[j, b] @ dictionary[b, indices[j, b]] for b in range(values.shape[1])])
        for j in range(values.shape[0])
    ]
    return torch.stack(rows)


def test_all_atoms_of_a_unit_dictionary_give_the_weight_itself():
    old = linear()
    weight = old.weight.detach()
    unit = torch.eye(WIDTH).expand(IN // WIDTH, -1, -1)
    every = torch.arange(WIDTH).expand(OUT, IN // WIDTH, -1)
    part = DenseSparseLinear.like(old, WIDTH, WIDTH, WIDTH)
    part.carry(old, Factors(unit, weight.view(OUT, -1, WIDTH), every))
    assert torch.equal(part.weight, weight) and torch.equal(part.bias, old.bias)
    found = factorise(weight, WIDTH, WIDTH, WIDTH)
    assert (product(found) - weight).norm() < 2e-3 * weight.norm()


@pytest.mark.parametrize("rank", [2, 4])
def test_all_of_few_atoms_come_to_the_best_low_rank(rank):
    torch.manual_seed(0)
    weight = torch.randn(64, 32)
    found = factorise(weight, 16, rank, rank, iterations=60)
    for block, near in zip(blocks_of(weight, 16), blocks_of(product(found), 16), strict=True):
        best = torch.linalg.svdvals(block)[rank:].square().sum().sqrt()
        assert (block - near).norm() <= 1.02 * best


def test_pursuit_leaves_the_least_squares_residual_of_its_atoms():
    torch.manual_seed(1)
    blocks = torch.randn(2, 30, 16)
    dictionary = nn.functional.normalize(torch.randn(2, 20, 16), dim=-1)
    values, indices = pursue(blocks, dictionary, 4)
    assert values.shape == indices.shape == (2, 30, 4)
    for b in range(2):
        for j in range(30):
            assert len(set(indices[b, j].tolist())) == 4
            atoms = dictionary[b, indices[b, j]]
            residual = blocks[b, j] - values[b, j] @ atoms
            assert (atoms @ residual).abs().max() < 1e-4
    # greedy: the first atom is the one that correlates most
    one = pursue(blocks, dictionary, 1)[1]
    assert torch.equal(one[..., 0], (blocks @ dictionary.mT).abs().argmax(-1))


def test_the_best_of_the_turns_is_kept_and_more_turns_help():
    torch.manual_seed(2)
    weight = torch.randn(96, 64)
    errors = [float((product(factorise(weight, 16, 24, 2, iterations=n)) - weight).norm()) for n in (0, 1, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]


def test_turns_are_deterministic_and_blocks_do_not_depend_on_each_other(monkeypatch):
    torch.manual_seed(3)
    weight = torch.randn(40, 48)
    whole = factorise(weight, 16, 12, 3)
    monkeypatch.setattr("leanformers.parts.dictionary._CHUNK", 1)  # one block at a time
    for one, other in zip(whole, factorise(weight, 16, 12, 3), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_every_row_of_a_block_has_its_number_of_atoms_in_training_too():
    part = made()
    assert (part.mask.sum(-1) == 3).all()
    part.loosen(torch.randn(IN // WIDTH, OUT, 10))
    assert (part.mask.sum(-1) == 3).all() and ((part.coefficients() != 0).sum(-1) <= 3).all()


@pytest.mark.parametrize("mode", ["materialised", "factored"])
def test_both_modes_and_training_compute_the_same(mode):
    part, hidden = made(mode=mode), tokens(5, 7)
    expected = nn.functional.linear(hidden, product(Factors(part.dictionary, part.values, part.indices)), part.bias)
    torch.testing.assert_close(part(hidden), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        before = part(hidden)
        part.loosen(torch.randn(IN // WIDTH, OUT, 10))
        torch.testing.assert_close(part(hidden), before, rtol=1e-5, atol=1e-5)
        part.renormalise()
        torch.testing.assert_close(part(hidden), before, rtol=1e-4, atol=1e-4)
        part.settle()
        part.harden()
        torch.testing.assert_close(part(hidden), before, rtol=1e-4, atol=1e-4)
    assert part.latent is None and set(part.state_dict()) == {"dictionary", "values", "packed", "bias"}


def test_the_gradient_reaches_every_entry_until_the_pattern_settles():
    part = made()
    part.loosen()
    mask = part.mask
    (part(tokens(6)) ** 2).sum().backward()
    plain = torch.zeros_like(part.latent)
    blocks = tokens(6).view(6, -1, WIDTH)
    mixed = torch.einsum("tbw,brw->tbr", blocks, part.dictionary.detach())
    plain = torch.einsum("tbr,to->bor", mixed, 2 * part(tokens(6)).detach())
    torch.testing.assert_close(part.latent.grad, plain, rtol=1e-4, atol=1e-4)
    assert (part.latent.grad[~mask] != 0).all() and part.dictionary.grad.any()
    part.latent.grad = None
    part.settle()
    (part(tokens(6)) ** 2).sum().backward()
    assert not part.latent.grad[~mask].any() and not part.latent[~mask].any()
    torch.testing.assert_close(part.latent.grad[mask], plain[mask], rtol=1e-4, atol=1e-4)


def test_what_starts_outside_the_pattern_stays_outside_at_first():
    part = made()
    mask = part.mask
    part.loosen(100 * torch.randn(IN // WIDTH, OUT, 10))
    assert torch.equal(part.mask, mask) and (part.latent != 0).all()


@pytest.mark.parametrize("rank", [2, 3, 9, 16, 17, 300])
def test_bits_are_those_of_the_formula(rank):
    old = linear(in_features=32, out_features=24)
    part = DenseSparseLinear.like(old, rank, 16, 2)
    indices = torch.arange(24 * 2).view(24, 2, 1) % (rank - 1) + torch.tensor([0, 1])
    part.carry(old, Factors(torch.randn(2, rank, 16), torch.randn(24, 2, 2), indices))
    assert torch.equal(part.indices, indices)
    stored = sum(8 * t.numel() * t.element_size() for name, t in part.state_dict().items() if name != "bias")
    wanted = dense_sparse_bits(24, 32, rank, 16, 2, 32)
    assert wanted == 32 * rank * 32 + 24 * 2 * 2 * (32 + index_bits(rank))
    assert wanted <= stored < wanted + 8
    assert index_bits(rank) == (rank - 1).bit_length()


def test_the_kept_product_follows_its_factors():
    part = made().eval()
    with torch.no_grad():
        before = part(tokens(2))
        assert part.whole is not None and torch.equal(part(tokens(2)), before)
        part.values.mul_(2)
        torch.testing.assert_close(part(tokens(2)) - part.bias, 2 * (before - part.bias))
        part.scale(0, torch.full((OUT,), 0.5))
        part.scale(1, torch.full((IN,), 3.0))
        torch.testing.assert_close(part(tokens(2)), 3 * (before - part.bias * 2) + part.bias, rtol=1e-4, atol=1e-4)


def test_a_product_kept_from_inference_serves_gradients_of_inputs():
    part = made().requires_grad_(False)
    with torch.inference_mode():
        part(tokens(2))
    hidden = tokens(2).requires_grad_()
    part(hidden).sum().backward()
    torch.testing.assert_close(hidden.grad, part.weight.sum(0).expand(2, IN), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((10, 7, 3), "do not divide"), ((2, 8, 3), "3 of 2 atoms"), ((1, 8, 1), "2 at least"), ((10, 8, 0), "1 at least")],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(LeanError, match=words):
        DenseSparseLinear.like(linear(), *sizes)


def test_indices_that_fit_no_dictionary_are_refused():
    part = made()
    for indices in (part.indices + 10, part.indices.flip(-1)):
        with pytest.raises(LeanError, match="must rise and lie below 10"):
            part.fill(Factors(part.dictionary, part.values, indices))
