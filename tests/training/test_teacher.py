"""The teacher's store: computed once, found by content, read by another process, exact enough."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from leanformers.errors import LeanError
from leanformers.training import Distillation, Teacher, fit, losses


def counting(model: Any) -> list[int]:
    """Examples that go through the model from now on, per pass."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    return seen


def test_outputs_are_computed_once_and_found_by_place(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any
) -> None:
    task, model = sentiment(40), bert()
    teacher, seen = Teacher(model, task, tokenizer, batch_size=7), counting(model)
    distinct = len({str(f["input_ids"]) for f in task.features(tokenizer, "train")})
    teacher.prepare("train", 10)
    teacher.prepare("train")
    teacher.prepare("validation")  # the same sentences again
    assert sum(seen) == distinct == 40
    index = torch.tensor([5, 0, 33])
    batch = task.collate(tokenizer, [task.features(tokenizer, "train")[i] for i in index])
    with torch.no_grad():
        live = task.forward(model, batch)
    kept = teacher.outputs(index)
    assert kept.dtype == torch.float32 and kept.shape == live.shape
    # Logits are kept up to a constant, in float16: identity 8.
    student = torch.randn(3, 2)
    expected = losses.logits(student, live, temperature=2.0)
    assert losses.logits(student, kept, temperature=2.0).item() == pytest.approx(expected.item(), rel=1e-3)


def test_a_folder_serves_the_next_process_and_only_the_same_teacher(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    task = sentiment(20)
    first = Teacher(bert(), task, tokenizer, folder=tmp_path)
    first.prepare("train")
    model = bert()
    second, seen = Teacher(model, task, tokenizer, folder=tmp_path), counting(model)
    second.prepare("train")
    assert not seen
    index = list(range(20))
    assert torch.equal(first.outputs(index), second.outputs(index))
    other = bert(seed=1)
    third, seen = Teacher(other, task, tokenizer, folder=tmp_path), counting(other)
    third.prepare("train")
    assert sum(seen) == 20


def test_a_damaged_file_is_computed_again(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    task = sentiment(20)
    Teacher(bert(), task, tokenizer, folder=tmp_path).prepare("train")
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    model = bert()
    again, seen = Teacher(model, task, tokenizer, folder=tmp_path), counting(model)
    again.prepare("train")
    assert sum(seen) == 20


def test_pairs_keep_their_two_vectors(bert: Callable[..., Any], embedding: Callable[..., Any], tokenizer: Any) -> None:
    task, model = embedding(9, objective="pairs"), bert(labels=0)
    teacher = Teacher(model, task, tokenizer, batch_size=4)
    teacher.prepare("train")
    features = task.features(tokenizer, "train")
    index = [4, 1, 7]
    with torch.no_grad():
        live = task.forward(model, task.collate(tokenizer, [features[i] for i in index]))  # [6, width]
    torch.testing.assert_close(teacher.outputs(index), live, rtol=0, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"objective": "pairs"}])
def test_embedders_learn_a_teachers_vectors(
    options: dict[str, Any], bert: Callable[..., Any], embedding: Callable[..., Any], tokenizer: Any
) -> None:
    task = embedding(24, **options)
    teacher = Teacher(bert(labels=0, layers=2), task, tokenizer)
    for objective in ("cosine", "mse", "similarity"):
        student = bert(labels=0, layers=1, seed=3)
        options: dict[str, Any] = {
            "teacher": teacher,
            "distillation": Distillation(objective=objective),
            "progress": False,
        }
        first = fit(student, task, tokenizer, max_steps=1, learning_rate=1e-5, **options)
        after = fit(student, task, tokenizer, epochs=8, learning_rate=2e-2, batch_size=8, **options)
        assert after.loss < 0.5 * first.loss


def test_top_k_is_stored_per_position_and_bounds_the_live_loss(
    llama: Callable[..., Any], language: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    task, model = language(), llama()
    results = []
    for top_k, folder in ((None, None), (4, tmp_path), (4, tmp_path), (28, None)):
        teacher = Teacher(model, task, tokenizer, top_k=top_k, folder=folder)
        assert teacher.stored == (top_k is not None)
        student = copy.deepcopy(model)
        with torch.no_grad():
            for p in student.parameters():
                p.mul_(3)
        result = fit(student, task, tokenizer, max_steps=1, teacher=teacher, progress=False,
                     distillation=Distillation(alpha=1.0), learning_rate=1e-9)  # fmt: skip
        results.append(result.loss)
    live, four, read, nearly_all = results
    assert 0 < four < live and read == four
    assert nearly_all == pytest.approx(live, rel=5e-3)


def test_a_cut_vocabulary_is_translated_before_the_softmax(
    llama: Callable[..., Any], language: Callable[..., Any], tokenizer: Any, cut_tokenizer: Any
) -> None:
    """A student that is the teacher with rows cut has nothing to learn: they agree on the kept tokens."""
    task, model = language(), llama()
    teacher = Teacher(copy.deepcopy(model), task, tokenizer)
    table = teacher.token_map(cut_tokenizer)
    assert table is not None and len(table) == len(cut_tokenizer) < len(tokenizer)
    assert teacher.token_map(tokenizer) is None
    rows = torch.cat([table, torch.zeros(3, dtype=torch.long)])  # three rows of padding
    embeddings = torch.nn.Embedding(len(rows), 16)
    embeddings.weight.data = model.model.embed_tokens.weight.data[rows].clone()
    model.set_input_embeddings(embeddings)
    model.lm_head.weight = embeddings.weight
    settings = Distillation(alpha=1.0)
    result = fit(model, task, cut_tokenizer, max_steps=1, teacher=teacher, distillation=settings, progress=False)
    assert result.loss < 1e-6
    with pytest.raises(LeanError, match="token"):
        Teacher(model, task, cut_tokenizer).token_map(tokenizer)
    with pytest.raises(LeanError, match="top"):
        fit(model, task, cut_tokenizer, teacher=Teacher(llama(), task, tokenizer, top_k=3), progress=False)


def test_a_classifier_with_a_cut_vocabulary_takes_the_teachers_stored_outputs(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any, cut_tokenizer: Any
) -> None:
    task = sentiment(40)
    teacher = Teacher(bert(), task, tokenizer)
    result = fit(bert(seed=2), task, cut_tokenizer, epochs=1, teacher=teacher, progress=False)
    assert result.steps == 2


def test_what_does_not_fit_is_refused(
    bert: Callable[..., Any], sentiment: Callable[..., Any], language: Callable[..., Any], tokenizer: Any
) -> None:
    task, model = sentiment(), bert()
    with pytest.raises(LeanError, match="top_k"):
        Teacher(model, task, tokenizer, top_k=3)
    with pytest.raises(LeanError, match="deepcopy"):
        fit(model, task, tokenizer, teacher=Teacher(model, task, tokenizer), progress=False)
    with pytest.raises(LeanError, match="task"):
        fit(bert(), task, tokenizer, teacher=Teacher(model, language(), tokenizer), progress=False)
    with pytest.raises(LeanError, match="needs a teacher"):
        fit(bert(), task, tokenizer, distillation=Distillation(), progress=False)
    teacher = bert(id2label={0: "yes", 1: "no"})
    with pytest.raises(LeanError, match="labels"):
        fit(bert(id2label={0: "no", 1: "yes"}), task, tokenizer, teacher=Teacher(teacher, task, tokenizer),
            progress=False)  # fmt: skip
    with pytest.raises(LeanError, match="shape"):
        fit(bert(labels=3), task, tokenizer, teacher=Teacher(bert(), task, tokenizer), progress=False)


def test_numbers_and_masked_words_are_learned_from_a_teacher_too(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any
) -> None:
    from leanformers.tasks.language import MaskedLM
    from leanformers.tasks.text import TextRegression

    rows = [{"text": row["text"], "label": float(len(row["text"]))} for row in sentiment(24).splits["train"]]
    splits = {"train": rows, "validation": rows, "test": rows}
    for task, make in (
        (TextRegression("toy-numbers", splits, max_length=32), lambda seed: bert(labels=1, seed=seed)),
        (MaskedLM("toy-masked", splits, max_length=32), lambda seed: masked(bert(seed=seed).config, seed)),
    ):
        teacher = Teacher(make(1), task, tokenizer)
        options: dict[str, Any] = {
            "teacher": teacher,
            "distillation": Distillation(alpha=1.0, hidden=0.1),
            "progress": False,
        }
        student = make(2)
        first = fit(student, task, tokenizer, max_steps=1, learning_rate=1e-9, **options).loss
        last = fit(student, task, tokenizer, epochs=30, learning_rate=1e-2, **options).loss
        assert last < 0.3 * first


def masked(config: Any, seed: int) -> Any:
    from transformers import BertForMaskedLM

    torch.manual_seed(seed)
    return BertForMaskedLM(config).eval()


def test_unlabelled_rows_learn_from_the_teacher_alone(
    bert: Callable[..., Any], sentiment: Callable[..., Any], tokenizer: Any
) -> None:
    """Labels of -100 count for the teacher's term and not for the labels'."""
    task = sentiment(32)
    features = task.features(tokenizer, "train")
    teacher = Teacher(bert(seed=3, initializer_range=0.5), task, tokenizer)
    losses_of = []
    for keep in (32, 8, 0):
        for index, feature in enumerate(features):
            feature["labels"] = feature["labels"] if index < keep else -100
        settings = Distillation(alpha=0.5)
        result = fit(bert(), task, tokenizer, max_steps=1, teacher=teacher, distillation=settings, progress=False)
        losses_of.append(result.loss)
    with torch.no_grad():
        batch = task.collate(tokenizer, features)
        soft = losses.logits(task.forward(bert(), batch), task.forward(teacher.model, batch), temperature=2.0)
    assert losses_of[2] == pytest.approx(0.5 * soft.item(), rel=1e-3)
    assert losses_of[0] > losses_of[2] and losses_of[1] > losses_of[2]
