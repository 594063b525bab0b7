"""Settings, the matching of layers, and what is recorded inside a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from leanformers.errors import LeanError
from leanformers.training import Distillation, Teacher, fit
from leanformers.training.batches import INDEX, BucketSampler, counts
from leanformers.training.capture import fingerprint, recording
from leanformers.training.distillation import DistillationLoss, match_layers
from leanformers.training.pairing import pair


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": 1.2},
        {"alpha": -0.1},
        {"temperature": 0},
        {"hidden": -1},
        {"relation_heads": 0},
        {"layer_map": (0, -1)},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LeanError, match=next(iter(wrong))):
        Distillation(**wrong)


def test_defaults_follow_the_kind() -> None:
    found = Distillation().resolved("text-classification")
    assert (found.temperature, found.alpha, found.objective) == (2.0, 0.9, "kl")
    assert Distillation().resolved("causal-lm").temperature == 1.0
    assert Distillation().resolved("embedding").alpha == 1.0
    assert Distillation(temperature=3.0).resolved("causal-lm").temperature == 3.0
    for kind, objective in (("embedding", "kl"), ("text-regression", "kl"), ("causal-lm", "cosine")):
        with pytest.raises(LeanError, match=objective):
            Distillation(objective=objective).resolved(kind)


def test_layers_match_by_index_by_share_or_by_map() -> None:
    assert match_layers(3, 3, None) == [0, 1, 2]
    assert match_layers(3, 6, None) == [1, 3, 5]
    assert match_layers(3, 6, (0, 2, 5)) == [0, 2, 5]
    for wrong in ((4, 6, None), (3, 6, (0, 2)), (3, 6, (0, 2, 6))):
        with pytest.raises(LeanError):
            match_layers(*wrong)


def test_hidden_states_are_recorded_before_a_final_norm(llama: Callable[..., Any]) -> None:
    model = llama()
    batch = {"input_ids": torch.randint(4, 20, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    with torch.no_grad(), recording(model, hidden=True) as record:
        expected = model(**batch, output_hidden_states=True).hidden_states
    assert len(record.hidden) == 3
    for ours, theirs in zip(record.hidden[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(model.model.norm(record.hidden[-1]), expected[-1])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_recorded_attention_is_what_the_model_computes(family: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(family)()
    batch = {"input_ids": torch.randint(4, 20, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    before = model.config._attn_implementation
    with torch.no_grad():
        plain = model(**batch).logits
        with recording(model, attention=True) as record:
            recorded = model(**batch).logits
        torch.testing.assert_close(recorded, plain)
        model.set_attn_implementation("eager")
        maps = model(**batch, output_attentions=True).attentions
        model.set_attn_implementation(before)
    assert len(record.attention) == 2
    future = torch.ones(6, 6, dtype=torch.bool).triu(1) & (family == "llama")
    for ours, theirs in zip(record.attention, maps, strict=True):
        scores = ours.scores().masked_fill(future, -1e9)
        torch.testing.assert_close(scores.softmax(-1), theirs, rtol=1e-4, atol=1e-5)
        assert ours.joined("query").shape == (2, 6, 16)
    assert model.config._attn_implementation == before


def test_a_fingerprint_sees_every_weight(bert: Callable[..., Any]) -> None:
    model = bert()
    assert fingerprint(model) == fingerprint(bert()) != fingerprint(bert(seed=1))
    with torch.no_grad():
        model.classifier.bias[0] += 1e-6
    assert fingerprint(model) != fingerprint(bert())


def distil(
    student: Any, teacher: Any, task: Any, tokenizer: Any, settings: Distillation, rows: slice = slice(0, 8)
) -> torch.Tensor:
    """The loss of one batch, as fit computes it."""
    source = Teacher(teacher, task, tokenizer)
    source.prepare("train")
    objective = pair(student, task, tokenizer, settings, source)
    features = task.features(tokenizer, "train")[rows]
    batch = task.collate(tokenizer, features)
    batch[INDEX] = torch.arange(len(features))
    causal = objective.distillation is not None and objective.distillation.causal
    return objective(batch, counts(batch, task.kind, causal))


ALL = Distillation(alpha=1.0, hidden=1.0, attention=1.0, relation=1.0)


@pytest.mark.parametrize("kind", ["sentiment", "language"])
def test_a_copy_of_the_teacher_has_nothing_to_learn(kind: str, request: pytest.FixtureRequest, tokenizer: Any) -> None:
    task = request.getfixturevalue(kind)()
    teacher = request.getfixturevalue("bert" if kind == "sentiment" else "llama")()
    student = copy.deepcopy(teacher)
    loss = distil(student, teacher, task, tokenizer, ALL)
    assert abs(loss.item()) < 1e-5  # the stored logits are float16
    # A live teacher (language model) sees no rounding at all.
    loss.backward()
    largest = max(p.grad.abs().max().item() for p in student.parameters() if p.grad is not None)
    assert largest < (1e-3 if kind == "sentiment" else 1e-6)


def test_dropped_layers_match_their_own_indices(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any
) -> None:
    teacher = bert(layers=4, initializer_range=0.3)
    student = copy.deepcopy(teacher)
    student.bert.encoder.layer = student.bert.encoder.layer[:2]
    settings = Distillation(alpha=0.0, hidden=1.0)
    own = distil(student, teacher, sentiment(), tokenizer, Distillation(alpha=0.0, hidden=1.0, layer_map=(0, 1)))
    uniform = distil(student, teacher, sentiment(), tokenizer, settings)
    task_loss = distil(student, teacher, sentiment(), tokenizer, Distillation(alpha=0.0))
    assert own.item() == pytest.approx(task_loss.item(), abs=1e-5) and uniform > own + 1e-2


def test_another_width_is_projected_by_a_matrix_that_is_not_saved(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any
) -> None:
    student, teacher = bert(width=8), bert(width=16)
    names = set(student.state_dict())
    loss = DistillationLoss(ALL, "text-classification", widths=(8, 16), depths=(2, 2))
    assert loss.projection is not None and loss.projection.weight.shape == (16, 8)
    result = fit(
        student,
        sentiment(),
        tokenizer,
        max_steps=2,
        teacher=Teacher(teacher, sentiment(), tokenizer),
        distillation=Distillation(hidden=1.0, relation=1.0, relation_heads=4),
        progress=False,
    )
    assert result.steps == 2 and set(student.state_dict()) == names


def test_relations_accept_other_head_counts_and_scores_refuse_them(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any
) -> None:
    student, teacher = bert(heads=4), bert(heads=2)
    assert distil(student, teacher, sentiment(), tokenizer, Distillation(relation=1.0)).isfinite()
    with pytest.raises(LeanError, match="heads"):
        distil(student, teacher, sentiment(), tokenizer, Distillation(attention=1.0))


def test_buckets_cover_every_example_once_and_depend_on_seed_and_epoch_alone() -> None:
    lengths = [int(n) for n in torch.randint(3, 60, (1000,))]
    sampler = BucketSampler(lengths, 16, seed=3)
    first, again = list(sampler), list(BucketSampler(lengths, 16, seed=3))
    assert first == again and len(first) == len(sampler) == 63
    assert sorted(index for batch in first for _, index in batch) == list(range(1000))
    sampler.epoch = 1
    assert [[i for _, i in b] for b in sampler] != [[i for _, i in b] for b in first]
    places = sum(len(b) * max(lengths[i] for _, i in b) for b in first)
    assert sum(lengths) / places > 0.95


def test_attention_is_not_matched_where_one_was_dropped(bert, sentiment, tokenizer) -> None:
    from leanformers.surgery import DropSublayers, apply

    model, task = bert(), sentiment()
    teacher = Teacher(copy.deepcopy(model), task, tokenizer)
    apply(model, DropSublayers(path="encoder.layer.0", sublayers=("attention",)))
    with pytest.raises(LeanError, match=r"attention of encoder\.layer\.0 was dropped"):
        pair(model, task, tokenizer, Distillation(attention=1.0), teacher)
    assert pair(model, task, tokenizer, Distillation(hidden=1.0, relation=1.0), teacher) is not None
