"""The inverse Fisher in blocks: against inverses computed whole, and the optimal updates against their definition."""

from __future__ import annotations

import pytest
import torch
from subjects import decoder, encoder

from leanformers.errors import LeanError
from leanformers.training.fisher import BlockFisher, fisher_bytes, stream_gradients


def built(numel=10, block=10, damp=1e-3, count=32, dtype=torch.float32, seed=0):
    """A BlockFisher and the whole matrices [B, B] of its blocks in float64."""
    gradients = torch.randn(count, numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fisher = BlockFisher(numel, block, damp, count, dtype=dtype)
    for gradient in gradients:
        fisher.add(gradient)
    padded = torch.nn.functional.pad(gradients, (0, -numel % block)).view(count, -1, block)
    whole = torch.einsum("mbi,mbj->bij", padded, padded) / count + damp * torch.eye(block, dtype=torch.float64)
    return fisher, whole


@pytest.mark.parametrize("block", [1, 3, 5, 10])
@pytest.mark.parametrize(("damp", "dtype"), [(1e-5, torch.float32), (1e-9, torch.float64)])
def test_rank_one_updates_give_the_inverse(block, damp, dtype):
    fisher, whole = built(block=block, damp=damp, dtype=dtype)
    expected = torch.linalg.inv(whole)
    assert ((fisher.inverse.double() - expected).norm() / expected.norm()) < 1e-3
    assert torch.equal(fisher.inverse, fisher.inverse.mT)
    assert fisher.inverse.numel() * 4 == fisher_bytes(10, block)


def test_the_update_of_one_weight_is_the_least_that_makes_it_zero():
    fisher, whole = built(damp=1e-2, dtype=torch.float64)
    weight = torch.randn(10, dtype=torch.float64)
    pruned = torch.arange(10) == 4
    step = fisher.compensation(weight, pruned)
    # min 1/2 d^T F d with d_4 = -w_4: the rest solves F_rr d_r = F_r4 w_4
    rest = ~pruned
    expected = -weight.clone()
    expected[rest] = torch.linalg.solve(whole[0][rest][:, rest], whole[0][rest][:, 4] * weight[4])
    torch.testing.assert_close(step[rest], expected[rest])
    assert step[4] == pytest.approx(-weight[4].item())
    loss = float(step @ whole[0] @ step / 2)
    assert fisher.scores(weight)[4] == pytest.approx(loss)


def test_the_update_of_one_group_is_the_least_that_makes_it_zero():
    fisher, whole = built(numel=8, block=8, damp=1e-2, dtype=torch.float64)
    weight = torch.randn(8, dtype=torch.float64)
    pruned = torch.arange(8) >= 4
    step = fisher.compensation(weight, pruned, group=4)
    expected = torch.linalg.solve(whole[0][:4, :4], whole[0][:4, 4:] @ weight[4:])
    torch.testing.assert_close(step, torch.cat([expected, -weight[4:]]))
    assert fisher.scores(weight, group=4)[1] == pytest.approx(float(step @ whole[0] @ step / 2))


def test_groups_of_one_block_and_padding_do_not_mix():
    fisher, _ = built(numel=10, block=4, damp=1e-2)
    weight = torch.randn(10)
    pruned = torch.zeros(10, dtype=torch.bool)
    pruned[9] = True
    step = fisher.compensation(weight, pruned)
    assert len(step) == 10 and len(fisher.scores(weight)) == 10
    assert (step[:8] == 0).all() and step[8] != 0


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("spoilt", [-1.0, float("nan")])
def test_an_inverse_that_is_no_longer_positive_is_refused(group, spoilt):
    fisher, _ = built()
    fisher.inverse.mul_(spoilt)
    with pytest.raises(LeanError, match="not positive definite any more: raise damp"):
        fisher.scores(torch.ones(10), group)


def test_a_block_of_one_moves_nothing_else():
    fisher, _ = built(block=1)
    weight, pruned = torch.randn(10), torch.arange(10) < 5
    step = fisher.compensation(weight, pruned)
    torch.testing.assert_close(step[:5], -weight[:5])
    assert (step[5:] == 0).all()


@pytest.mark.parametrize("make", [encoder, decoder])
def test_streamed_gradients_are_those_of_the_loss(make):
    subject = make()
    subject.task.splits["train"] = subject.task.splits["train"][:8]
    weights = {path: linear.module.weight for path, linear in subject.anatomy.linears().items()}
    frozen = next(iter(subject.model.parameters()))
    frozen.requires_grad_(False)
    found = {path: [] for path in weights}
    subject.model.train()
    stream_gradients(
        subject.model,
        subject.task,
        subject.tokenizer,
        weights,
        lambda path, gradient: found[path].append(gradient.clone()),
        count=5,
        batch_size=2,
    )
    assert subject.model.training and not frozen.requires_grad
    assert all(p.grad is None for p in subject.model.parameters())
    assert all(len(gradients) == 5 and not gradients[0].equal(gradients[1]) for gradients in found.values())
    subject.model.eval()
    features = subject.task.features(subject.tokenizer, "train", 8)  # chunks of 8 rows
    stream_gradients(
        subject.model,
        subject.task,
        subject.tokenizer,
        weights,
        lambda path, gradient: found[path].append(gradient.clone()),
        count=1,
        batch_size=len(features),
    )
    batch = subject.task.collate(subject.tokenizer, features)
    subject.task.loss(subject.task.forward(subject.model, batch), batch).backward()
    for path, weight in weights.items():
        torch.testing.assert_close(found[path][-1], weight.grad, rtol=1e-3, atol=1e-6)


def test_gradients_that_are_not_finite_are_refused():
    subject = encoder()
    with torch.no_grad():
        subject.model.classifier.weight.fill_(float("inf"))
    weights = {path: linear.module.weight for path, linear in subject.anatomy.linears().items()}
    with pytest.raises(LeanError, match="not finite"):
        stream_gradients(
            subject.model, subject.task, subject.tokenizer, weights, lambda *_: None, count=2, batch_size=4
        )
