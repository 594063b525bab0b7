"""The batches that are timed: the same texts for all, no padding beyond the longest, tokens counted."""

from __future__ import annotations

import pytest
import torch

from leanformers.errors import LeanError
from leanformers.measure.batches import batch_tokens, real_batches, spread


def test_tokens_and_padding(task, tokenizer):
    real = real_batches(task, {"a": tokenizer}, batch_size=8, count=4)["a"]
    assert len(real.batches) == 4 and real.examples == (8, 8, 8, 8)
    lengths = sorted((len(r["ids"]) for r in task.rows[:32]), reverse=True)
    assert [b["input_ids"].shape[1] for b in real.batches] == lengths[::8]
    assert sum(real.tokens) == sum(lengths)
    assert real.padding == pytest.approx(1 - sum(lengths) / sum(8 * n for n in lengths[::8]))


def test_every_tokenizer_gets_the_same_rows(task, make):
    real = real_batches(task, {"a": make["tokenizer"](), "b": make["tokenizer"](2)}, batch_size=8, count=2)
    for one, two in zip(real["a"].batches, real["b"].batches, strict=True):
        assert torch.equal(one["input_ids"].repeat_interleave(2, dim=1), two["input_ids"])
    assert sum(real["b"].tokens) == 2 * sum(real["a"].tokens)


def test_the_same_texts_where_tokenizers_cut_them_into_other_chunks(make):
    task = make["task"](chunks=True)
    real = real_batches(task, {"a": make["tokenizer"](), "b": make["tokenizer"](3)}, batch_size=4, count=3)
    assert sum(real["b"].tokens) == 3 * sum(real["a"].tokens)
    assert sum(real["a"].examples) <= 12 < sum(real["b"].examples)


def test_an_incomplete_batch_is_left_out_unless_it_is_the_only_one(make):
    few = real_batches(make["task"](rows=10), {"a": make["tokenizer"]()}, batch_size=8, count=8)["a"]
    assert few.examples == (8,)
    one = real_batches(make["task"](rows=3), {"a": make["tokenizer"]()}, batch_size=8, count=8)["a"]
    assert one.examples == (3,)


def test_no_rows(make):
    with pytest.raises(LeanError, match="'tiny' has no rows"):
        real_batches(make["task"](rows=0), {"a": make["tokenizer"]()})


def test_batches_without_a_mask_count_their_ids():
    assert batch_tokens({"input_ids": torch.zeros(2, 3)}) == (6, 6)
    masks = {"query_attention_mask": torch.tensor([[1, 0]]), "body_attention_mask": torch.tensor([[1, 1, 0]])}
    assert batch_tokens(masks) == (3, 5)


@pytest.mark.parametrize(
    ("total", "wanted", "expected"), [(8, 8, list(range(8))), (8, 2, [2, 6]), (8, 1, [4]), (3, 0, [1])]
)
def test_spread(total, wanted, expected):
    assert spread(total, wanted) == expected
