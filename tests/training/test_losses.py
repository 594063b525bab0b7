"""The losses against the identities of the card `distillation` (numbers in the names)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from leanformers.errors import LeanError
from leanformers.training import losses

OBJECTIVES = losses.OBJECTIVES


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lengths_mask(*lengths: int, length: int) -> Tensor:
    return (torch.arange(length)[None] < torch.tensor(lengths)[:, None]).long()


def gradient(loss: Tensor, *of: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, of)])


# -- 1: a copy of the teacher
# ------------------------------------------------------------------------------------


def copies() -> dict[str, Any]:
    mask = lengths_mask(3, 5, length=5)
    states, scores, classes = random(2, 5, 8), random(2, 2, 5, 5), random(4, 6)
    one = {
        name: (classes, lambda s, t, n=name: losses.logits(s, t, objective=n, temperature=2.0)) for name in OBJECTIVES
    }
    return one | {
        "regression": (classes, losses.regression),
        "hidden": (states, lambda s, t: losses.hidden_states(s, t, mask=mask)),
        "cosine": (classes, losses.embedding_cosine),
        "similarity": (classes, losses.similarity),
        "scores": (scores, lambda s, t: losses.attention_scores(s, t, mask=mask)),
        "relation": (states, lambda s, t: losses.relation(s, t, heads=2, mask=mask, causal=True)),
    }


@pytest.mark.parametrize("name", copies())
def test_identity_1_copy_costs_nothing(name: str) -> None:
    values, loss = copies()[name]
    student = values.clone().requires_grad_()
    value = loss(student, values)
    assert abs(value.item()) < 1e-6
    assert gradient(value, student).abs().max() < 1e-6


def test_identity_1_soft_cross_entropy_is_the_entropy() -> None:
    teacher, student = random(7, 5), random(7, 5, seed=1)
    probabilities = teacher.softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    cross = functional.cross_entropy(student, probabilities)
    torch.testing.assert_close(losses.logits(student, teacher), cross - entropy)


# -- 2: the gradient
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_identity_2_finite_differences(objective: str, temperature: float) -> None:
    student = random(3, 4, dtype=torch.float64).requires_grad_()
    teacher = random(3, 4, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: losses.logits(s, teacher, objective=objective, temperature=temperature), (student,)
    )


def test_identity_2_gradient_formula() -> None:
    student, teacher = random(6, 5).requires_grad_(), random(6, 5, seed=1)
    found = gradient(losses.logits(student, teacher, temperature=3.0), student).view(6, 5)
    expected = 3.0 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)) / 6
    torch.testing.assert_close(found, expected.detach())


def test_finite_differences_of_the_others() -> None:
    mask = lengths_mask(2, 3, length=3)
    scores, states = random(2, 2, 3, 3, dtype=torch.float64), random(2, 3, 4, dtype=torch.float64)
    teacher_states = random(2, 3, 6, seed=2, dtype=torch.float64)
    for loss, values in (
        (lambda s: losses.relation(s, teacher_states, heads=2, mask=mask), states),
        (lambda s: losses.relation(s, teacher_states, heads=2, mask=mask, causal=True), states),
        (lambda s: losses.attention_scores(s, scores.flip(-1), mask=mask, causal=True), scores),
        (lambda s: losses.similarity(s[:, 0], teacher_states[:, 1], temperature=0.3), states),
        (lambda s: losses.embedding_cosine(s[:, 0], states[:, 1]), states),
    ):
        assert torch.autograd.gradcheck(loss, (values.clone().requires_grad_(),))


# -- 3: the limit of large temperatures
# --------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["kl", "reverse_kl"])
def test_identity_3_large_temperature_is_logit_matching(objective: str) -> None:
    student, teacher = random(8, 10), random(8, 10, seed=1)
    student, teacher = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
    limit = (student - teacher).square().sum(-1).mean() / (2 * 10)
    found = losses.logits(student.double(), teacher.double(), temperature=100.0, objective=objective)
    assert found.item() == pytest.approx(limit.item(), rel=0.02)


# -- 4: padding and micro-batches
# --------------------------------------------------------------------------------


def pad(values: Tensor, extra: int, *axes: int) -> Tensor:
    """Lengthen axes with noise: what stands there must not matter."""
    for axis in axes:
        shape = list(values.shape)
        shape[axis] = extra
        values = torch.cat([values, 50 * random(*shape, seed=9)], axis)
    return values


@pytest.mark.parametrize("causal", [False, True])
def test_identity_4_padding_changes_nothing(causal: bool) -> None:
    mask, longer = lengths_mask(3, 5, length=5), lengths_mask(3, 5, length=8)
    states, others = random(2, 5, 8), random(2, 5, 8, seed=1)
    scores, other_scores = random(2, 2, 5, 5), random(2, 2, 5, 5, seed=1)

    def all_of(mask: Tensor, s: Tensor, t: Tensor, ss: Tensor, st: Tensor) -> list[float]:
        return [
            losses.logits(s, t, mask=mask.bool()).item(),
            losses.hidden_states(s, t, mask=mask).item(),
            losses.relation(s, t, heads=2, mask=mask, causal=causal).item(),
            losses.attention_scores(ss, st, mask=mask, causal=causal).item(),
        ]

    short = all_of(mask, states, others, scores, other_scores)
    long = all_of(longer, pad(states, 3, 1), pad(others, 3, 1), pad(scores, 3, 2, 3), pad(other_scores, 3, 2, 3))
    assert long == pytest.approx(short, rel=1e-5)


def test_identity_4_micro_batches_add_up() -> None:
    mask = lengths_mask(3, 5, 1, length=5)
    states, others = random(3, 5, 8), random(3, 5, 8, seed=1)
    scores, other_scores = random(3, 2, 5, 5), random(3, 2, 5, 5, seed=1)
    tokens, pairs = mask.sum(), mask.sum(1).square().sum()

    def parts(rows: slice) -> Tensor:
        m, s, t = mask[rows], states[rows], others[rows]
        return torch.stack(
            [
                losses.logits(s, t, mask=m.bool(), count=tokens),
                losses.hidden_states(s, t, mask=m, count=tokens),
                losses.relation(s, t, heads=2, mask=m, count=tokens),
                losses.attention_scores(scores[rows], other_scores[rows], mask=m, count=pairs),
                losses.embedding_cosine(s[:, 0], t[:, 0], count=3),
            ]
        )

    torch.testing.assert_close(parts(slice(0, 1)) + parts(slice(1, 3)), parts(slice(0, 3)))


# -- 5, 6, 8
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_identity_5_constant_shift(objective: str) -> None:
    student, teacher = random(6, 5), random(6, 5, seed=1)
    found = losses.logits(student + 100, teacher - 37, temperature=2.0, objective=objective)
    torch.testing.assert_close(found, losses.logits(student, teacher, temperature=2.0, objective=objective))


def test_identity_6_orthogonal_maps_and_other_widths() -> None:
    mask = lengths_mask(3, 5, length=5)
    student, teacher = random(2, 5, 12), random(2, 5, 8, seed=1)
    before = losses.relation(student, teacher, heads=2, mask=mask)
    turned = student.clone()
    for head in range(2):
        rotation = torch.linalg.qr(random(6, 6, seed=head)).Q
        turned[..., 6 * head : 6 * head + 6] = student[..., 6 * head : 6 * head + 6] @ rotation
    torch.testing.assert_close(losses.relation(turned, teacher, heads=2, mask=mask), before)


def test_identity_8_half_precision_logits() -> None:
    student, teacher = random(64, 20), 10 * random(64, 20, seed=1)
    for temperature in (1.0, 2.0):
        exact = losses.logits(student, teacher, temperature=temperature)
        cached = losses.logits(student, teacher.half(), temperature=temperature)
        assert cached.item() == pytest.approx(exact.item(), rel=1e-3)


# -- chunks, top k, traps
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_chunks_change_neither_value_nor_gradient(objective: str) -> None:
    student, teacher = random(11, 7).requires_grad_(), random(11, 7, seed=1)
    whole = losses.logits(student, teacher, objective=objective)
    chunked = losses.logits(student, teacher, objective=objective, chunk=3)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(gradient(chunked, student), gradient(whole, student))
    with torch.no_grad():
        torch.testing.assert_close(losses.logits(student, teacher, objective=objective, chunk=3), whole)


@pytest.mark.parametrize("chunk", [None, 2])
def test_top_k_of_all_is_the_full_divergence_and_fewer_bound_it(chunk: int | None) -> None:
    student, teacher = random(5, 9).requires_grad_(), random(5, 9, seed=1)
    full = losses.logits(student, teacher)
    previous = 0.0
    for k in (1, 3, 8):
        values, indices = teacher.log_softmax(-1).topk(k, -1)
        rest = (1 - values.exp().sum(-1)).log()
        found = losses.top_k_logits(student, values, indices, rest, chunk=chunk)
        assert previous - 1e-6 <= found.item() <= full.item() + 1e-6
        previous = found.item()
    assert previous == pytest.approx(full.item(), rel=1e-4)  # one class is left over: nothing is lumped
    torch.testing.assert_close(gradient(found, student), gradient(full, student), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_minus_infinity_is_a_probability_of_zero(objective: str) -> None:
    student, teacher = random(3, 4), random(3, 4, seed=1)
    student[:, 2] = teacher[:, 2] = -math.inf
    student.requires_grad_()
    found = losses.logits(student, teacher, objective=objective)
    kept = [0, 1, 3]
    torch.testing.assert_close(found, losses.logits(student[:, kept], teacher[:, kept], objective=objective))
    assert gradient(found, student).isfinite().all()


def test_nothing_counted_is_zero() -> None:
    student = random(2, 3, 4).requires_grad_()
    found = losses.logits(student, random(2, 3, 4, seed=1), mask=torch.zeros(2, 3, dtype=torch.bool))
    assert found.item() == 0 and gradient(found, student).abs().max() == 0


def test_no_gradient_reaches_the_teacher() -> None:
    mask = lengths_mask(3, 5, length=5)
    student, teacher = random(2, 5, 8).requires_grad_(), random(2, 5, 8, seed=1).requires_grad_()
    total = (
        losses.logits(student, teacher)
        + losses.hidden_states(student, teacher, mask=mask)
        + losses.relation(student, teacher, heads=2, mask=mask)
        + losses.similarity(student[:, 0], teacher[:, 0])
        + losses.embedding_cosine(student[:, 0], teacher[:, 0])
    )
    total.backward()
    assert teacher.grad is None and student.grad is not None


def test_bad_input_is_refused_in_a_sentence() -> None:
    a, b = random(2, 3, 4), random(2, 3, 5)
    mask = torch.ones(2, 3)
    scores = random(2, 2, 3, 3)
    for call in (
        lambda: losses.logits(a, b),
        lambda: losses.logits(a, a, temperature=0),
        lambda: losses.logits(a, a, objective="mse"),
        lambda: losses.hidden_states(a, b, mask=mask),
        lambda: losses.relation(a, b, heads=2, mask=mask),
        lambda: losses.attention_scores(scores, scores[:, :1], mask=mask),
        lambda: losses.similarity(a[:, 0], a[:1, 0]),
        lambda: losses.top_k_logits(a, a, a.long(), a[..., 0], temperature=2.0),
    ):
        with pytest.raises(LeanError):
            call()
