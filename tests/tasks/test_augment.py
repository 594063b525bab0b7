"""Altered copies: the rows themselves stay first, the copies differ, and the teacher answers each of them."""

from __future__ import annotations

import copy

import pytest
from subjects import decoder, encoder

from leanformers.errors import LeanError
from leanformers.tasks.augment import augmented
from leanformers.tasks.embedding import Embedding


def test_copies_follow_the_rows_and_are_the_same_for_a_seed():
    task = encoder().task
    rows = task.rows("train")
    once, again, other = (augmented(task, 2, mask="[MASK]", seed=seed) for seed in (0, 0, 1))
    assert once.rows("train")[: len(rows)] == rows and len(once.rows("train")) == 3 * len(rows)
    assert once.rows("train") == again.rows("train") != other.rows("train")
    assert once.fingerprint == again.fingerprint != task.fingerprint
    assert once.rows("test") == task.rows("test") and task.rows("train") == rows
    copies = once.rows("train")[len(rows) :]
    assert all(row["text"] for row in copies)
    assert sum(a["text"] != b["text"] for a, b in zip(rows, copies, strict=False)) > 0.9 * len(rows)
    words = {word for row in rows for word in row["text"].split()} | {"[MASK]"}
    assert {word for row in copies for word in row["text"].split()} <= words
    assert any("[MASK]" in row["text"] for row in copies)


def test_without_a_mask_words_are_left_out_and_a_text_is_never_emptied():
    rows = [{"query": "why", "body": "because of the long rain in the hills"}] * 50
    task = augmented(Embedding("pairs", {"train": rows, "validation": rows, "test": rows}), 4)
    assert all(row["query"] and row["body"] for row in task.rows("train"))
    assert "[MASK]" not in str(task.rows("train"))


def test_a_student_learns_from_copies_which_the_teacher_answers_once():
    from leanformers.methods import get
    from leanformers.training import Teacher

    subject = encoder()
    subject.teacher = Teacher(copy.deepcopy(subject.model), subject.task, subject.tokenizer)
    seen: list[int] = []
    subject.teacher.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    rows = len(subject.task.rows("train"))
    method = get("distillation").build({"epochs": 1, "augment": 2})
    method(subject)
    assert rows < sum(seen) <= 3 * rows  # equal texts are answered once
    assert subject.trained_examples == subject.full_examples == 3 * rows
    method(subject)
    assert sum(seen) <= 3 * rows


def test_copies_are_refused_where_they_have_no_one_answer():
    from leanformers.methods import get

    subject = decoder()
    with pytest.raises(LeanError, match="leave augment at 0"):
        augmented(subject.task, 1)
    assert "augment at 0" in (get("distillation").unsuitable(subject.anatomy, subject.task, {"augment": 1}) or "")
    with pytest.raises(LeanError, match="by distillation"):
        encoder().train(1, 1e-4, augment=1)
