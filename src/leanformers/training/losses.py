"""Distillation losses, as plain functions on tensors (card `distillation`).

Hinton, Vinyals, Dean 2015 (logits); Jiao et al. 2020, TinyBERT (attention scores, hidden states); Wang et al.
2021, MiniLMv2 (relations).

Every loss is a sum over the positions that count, divided by `count`. `count` defaults to the number in this
call; under gradient accumulation the caller passes the number in the whole accumulated batch, so that
splitting a batch changes nothing. Padding never enters a sum. Softmaxes are taken in float32 (float64 stays
float64).

Deviations from TinyBERT's code: its mean over attention scores includes the padding (set to 0), which makes
the loss depend on how far a batch was padded; here only pairs of real positions count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from leanformers.errors import LeanError

OBJECTIVES = ("kl", "reverse_kl", "js")
# Finite, so that a probability of 0 times its logarithm is 0 and not NaN.
_NEVER = -1e30
# Elements of logits turned into probabilities at once: 64 MiB in float32.
_CHUNK_ELEMENTS = 1 << 24

Count = int | float | Tensor


def _precise(values: Tensor) -> Tensor:
    values = values if values.dtype == torch.float64 else values.float()
    return values.masked_fill(torch.isneginf(values), _NEVER)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    return (teacher.exp() * (teacher - student)).sum(-1)


def _reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() * (student - teacher)).sum(-1)


def _js(student: Tensor, teacher: Tensor) -> Tensor:
    middle = torch.logaddexp(student, teacher) - math.log(2)
    return 0.5 * (_kl(middle, teacher) + _kl(middle, student))


_DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": _kl,
    "reverse_kl": _reverse_kl,
    "js": _js,
}


def _same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise LeanError(
            f"The student's {what} have shape {tuple(student.shape)} and the teacher's "
            f"{tuple(teacher.shape)}; distil from a teacher of the same task, labels and tokenizer."
        )


def logits(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    objective: str = "kl",
    count: Count | None = None,
    chunk: int | None = None,
) -> Tensor:
    """T^2 times the divergence of two softmaxes, summed over classes and averaged over counted positions.

    Args:
        student: logits [..., classes].
        teacher: logits of the same shape; no gradient flows into them.
        mask: bool [...], the positions that count; None counts all of them.
        temperature: T, above 0. The factor T^2 keeps the gradient's size as T grows.
        objective: "kl" (teacher || student), "reverse_kl" (student || teacher) or "js" (between the two).
        count: what to divide by; None for the number of counted positions.
        chunk: positions whose probabilities live in memory at once; None picks it from the number of classes.
            With more positions than that, probabilities are recomputed in the backward pass.
    """
    _same_shape(student, teacher, "logits")
    if temperature <= 0:
        raise LeanError(f"A distillation temperature is above 0, not {temperature}.")
    if objective not in _DIVERGENCES:
        raise LeanError(f"Unknown objective {objective!r}; choose one of {', '.join(OBJECTIVES)}.")
    student, teacher = _flatten(student, teacher, mask)  # [positions, classes]
    divergence = _DIVERGENCES[objective]

    def total(student_part: Tensor, teacher_part: Tensor) -> Tensor:
        return divergence(
            functional.log_softmax(_precise(student_part) / temperature, -1),
            functional.log_softmax(_precise(teacher_part) / temperature, -1),
        ).sum()

    return temperature**2 * _in_chunks(total, student, teacher, chunk) / _count(count, student.shape[0])


def top_k_logits(
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    rest: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    count: Count | None = None,
    chunk: int | None = None,
) -> Tensor:
    """KL(teacher || student) where the teacher's logits outside its top k are lumped in one class.

    Lumping is exact at T = 1, where the sum of the others' probabilities is stored; it bounds the full KL
    from below. Other temperatures need the logits that were not kept, so they are refused.

    Args:
        student: logits [..., classes]. values, indices: the teacher's k highest logits and their ids [...,
            k].
        rest: logsumexp of the teacher's other logits [...].
    """
    if temperature != 1.0:
        raise LeanError("Stored top-k logits serve temperature 1 only; set temperature=1.0 or keep the teacher live.")
    if mask is not None:
        student, values, indices, rest = student[mask], values[mask], indices[mask], rest[mask]
    classes = student.shape[-1]
    student = student.reshape(-1, classes)
    k = values.shape[-1]
    teacher = torch.cat([_precise(values).reshape(-1, k), _precise(rest).reshape(-1, 1)], -1).detach()
    indices = indices.reshape(-1, k).long()

    def total(student_part: Tensor, teacher_part: Tensor, index_part: Tensor) -> Tensor:
        log_probabilities = functional.log_softmax(_precise(student_part), -1)
        kept = log_probabilities.gather(-1, index_part)  # [positions, k]
        others = log_probabilities.scatter(-1, index_part, _NEVER).logsumexp(-1, keepdim=True)
        return _kl(torch.cat([kept, others], -1), functional.log_softmax(teacher_part, -1)).sum()

    return _in_chunks(total, student, teacher, chunk, indices) / _count(count, student.shape[0])


def regression(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, count: Count | None = None) -> Tensor:
    """Squared error of outputs [..., outputs], averaged over the outputs and the counted positions."""
    _same_shape(student, teacher, "outputs")
    student, teacher = _flatten(student, teacher, mask)
    squares = (_precise(student) - _precise(teacher)).square().mean(-1)
    return squares.sum() / _count(count, student.shape[0])


def hidden_states(student: Tensor, teacher: Tensor, *, mask: Tensor, count: Count | None = None) -> Tensor:
    """Squared error of hidden states [batch, length, hidden_size], averaged over width and over real
    positions.

    mask: [batch, length], non-zero at real positions. A student of another width is projected by the caller.
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise LeanError(
            f"The student's hidden states are {student.shape[-1]} wide and the teacher's "
            f"{teacher.shape[-1]}; project the student's with a learned matrix first."
        )
    return regression(student, teacher, mask=mask.bool(), count=count)


def embedding_cosine(student: Tensor, teacher: Tensor, *, count: Count | None = None) -> Tensor:
    """1 - cosine of sentence embeddings [batch, dimension], averaged over sentences."""
    _same_shape(student, teacher, "embeddings")
    cosine = functional.cosine_similarity(_precise(student), _precise(teacher).detach(), dim=-1)
    return (1 - cosine).sum() / _count(count, cosine.numel())


def similarity(student: Tensor, teacher: Tensor, *, temperature: float = 0.05, count: Count | None = None) -> Tensor:
    """KL between the in-batch cosine similarities of teacher and student, row by row.

    A sentence's similarity with itself is left out: it is 1 on both sides and would take most of the softmax.
    Widths may differ. Rows compare within one batch, so splitting the batch changes this loss, unlike the
    others. The temperature is a scale of similarities as in contrastive learning; there is no factor T^2.
    """
    if student.shape[0] != teacher.shape[0]:
        raise LeanError(f"{student.shape[0]} embeddings of the student against {teacher.shape[0]} of the teacher.")
    rows = student.shape[0]
    if rows < 2:
        return student.sum() * 0.0

    def log_rows(vectors: Tensor) -> Tensor:
        vectors = functional.normalize(_precise(vectors), dim=-1)
        similarities = (vectors @ vectors.T) / temperature  # [batch, batch]
        itself = torch.eye(rows, dtype=torch.bool, device=vectors.device)
        return functional.log_softmax(similarities.masked_fill(itself, _NEVER), -1)

    return _kl(log_rows(student), log_rows(teacher.detach())).sum() / _count(count, rows)


def real_pairs(mask: Tensor, causal: bool) -> Tensor:
    """Which (query, key) pairs are of real positions, and not in the future: bool [batch, length, length]."""
    real = mask.bool()
    pairs = real[:, :, None] & real[:, None, :]
    return pairs.tril() if causal else pairs


def attention_scores(
    student: Tensor, teacher: Tensor, *, mask: Tensor, causal: bool = False, count: Count | None = None
) -> Tensor:
    """TinyBERT: squared error of attention scores before the softmax, after scaling.

    student, teacher: [batch, heads, length, length], the same number of heads; mask [batch, length].
    Averaged over heads and over pairs of real positions; `count` counts pairs.
    """
    if student.shape[1] != teacher.shape[1]:
        raise LeanError(
            f"The student's attention has {student.shape[1]} heads and the teacher's {teacher.shape[1]}; "
            "attention scores compare head by head, so use the relation loss after head pruning."
        )
    _same_shape(student, teacher, "attention scores")
    pairs = real_pairs(mask, causal)
    # Masked scores may be -inf or the dtype's minimum: leave them out before squaring.
    outside = ~pairs[:, None]
    difference = _precise(student.masked_fill(outside, 0)) - _precise(teacher.detach().masked_fill(outside, 0))
    return difference.square().mean(1).sum() / _count(count, pairs.sum())


def relation(
    student: Tensor,
    teacher: Tensor,
    *,
    heads: int,
    mask: Tensor,
    causal: bool = False,
    count: Count | None = None,
) -> Tensor:
    """MiniLMv2: KL between the self-relations softmax(X X^T / sqrt(width / heads)) of two layers.

    Args:
        student, teacher: queries, keys or values with their heads concatenated, [batch, length, width]; the
            two widths and head counts may differ. heads: the number of relation heads, dividing both widths.
        mask: [batch, length]. count: what to divide by; None for the real query positions.
    """
    for name, states in (("student", student), ("teacher", teacher)):
        if heads < 1 or states.shape[-1] % heads:
            raise LeanError(f"{heads} relation heads do not divide the {name}'s width of {states.shape[-1]}.")

    def scores(states: Tensor) -> Tensor:
        batch, length, width = states.shape
        split = _precise(states).view(batch, length, heads, width // heads).transpose(1, 2)
        return split @ split.transpose(-1, -2) / math.sqrt(width / heads)  # [batch, heads, length, length]

    outside = ~real_pairs(mask, causal)[:, None]  # [batch, 1, length, length]
    rows = _kl(
        functional.log_softmax(scores(student).masked_fill(outside, _NEVER), -1),
        functional.log_softmax(scores(teacher.detach()).masked_fill(outside, _NEVER), -1),
    )  # [batch, heads, length]
    real = mask.bool()
    return rows.mean(1)[real].sum() / _count(count, real.sum())


def _flatten(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    teacher = teacher.detach()
    if mask is not None:
        return student[mask], teacher[mask]
    return student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])


def _count(count: Count | None, default: Any) -> Count:
    """The divisor; never 0, so that a batch where nothing counts gives a loss of 0."""
    value = default if count is None else count
    return value.clamp(min=1) if isinstance(value, Tensor) else max(value, 1)


def _in_chunks(
    total: Callable[..., Tensor], student: Tensor, teacher: Tensor, chunk: int | None, *more: Tensor
) -> Tensor:
    """Sum `total` over chunks of positions, keeping the probabilities of one chunk only."""
    positions, classes = student.shape
    size = chunk or max(1, _CHUNK_ELEMENTS // max(classes, 1))
    if positions <= size:
        return total(student, teacher, *more)
    result = student.new_zeros((), dtype=torch.float64 if student.dtype == torch.float64 else torch.float32)
    # split, not slicing: the backward of each slice would allocate the whole gradient.
    for parts in zip(student.split(size), teacher.split(size), *(m.split(size) for m in more), strict=True):
        if torch.is_grad_enabled() and student.requires_grad:
            result = result + checkpoint(total, *parts, use_reentrant=False, preserve_rng_state=False)
        else:
            result = result + total(*parts)
    return result
