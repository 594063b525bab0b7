import pytest
import torch
import torch.nn.functional as F

from leanformers.errors import LeanError
from leanformers.tasks import load, tfidf
from leanformers.tasks.embedding import Embedding, pool

from .tiny import bert_config, build, sentences

TEXTS = [t for t, _ in sentences(40, seed=3)]


def made(pairs=True, **options):
    rows = [{"query": " ".join(t.split()[:3]), "body": t} if pairs else {"text": t} for t in TEXTS]
    return Embedding("t", {"train": rows, "validation": rows[:10], "test": rows[10:]}, max_length=32, **options)


def test_a_pair_makes_two_features_in_order(bert_tokenizer):
    features = made().features(bert_tokenizer, "train")
    assert len(features) == 2 * len(TEXTS)
    assert features[1]["input_ids"] == bert_tokenizer(TEXTS[0])["input_ids"]


def test_the_teacher_agrees_with_itself(bert_encoder, bert_tokenizer):
    for pairs in (True, False):
        task = made(pairs)
        predict = lambda batch: task.forward(bert_encoder, batch)  # noqa: B023, E731
        task.attach_teacher(predict, bert_tokenizer)
        found = task.evaluate(predict, bert_tokenizer)
        assert found["cosine"] == pytest.approx(1) and found["neighbours@10"] == 1
        if pairs:
            assert found["old_index_ndcg@10"] == found["ndcg@10"] > 0.2


def test_the_old_index_is_searched_with_new_queries(bert_encoder, bert_tokenizer):
    task = made()
    predict = lambda batch: task.forward(bert_encoder, batch)  # noqa: E731
    own = task.vectors(predict, bert_tokenizer)
    task.attach_teacher(lambda batch: -predict(batch), bert_tokenizer)
    found = task.evaluate(predict, bert_tokenizer)
    assert found["old_index_ndcg@10"] == task.ndcg(own[::2], -own[1::2]) != found["ndcg@10"]
    assert task.evaluate(predict, bert_tokenizer, index=own[1::2])["old_index_ndcg@10"] == found["ndcg@10"]
    narrower = task.evaluate(lambda batch: predict(batch)[:, :8], bert_tokenizer)
    assert narrower["old_index_ndcg@10"] == 0 and "cosine" not in narrower


def test_texts_alone_need_a_teacher(bert_encoder, bert_tokenizer):
    task = made(pairs=False)
    with pytest.raises(LeanError, match="attach_teacher"):
        task.evaluate(lambda batch: task.forward(bert_encoder, batch), bert_tokenizer)
    batch = task.collate(bert_tokenizer, task.features(bert_tokenizer, "train")[:4])
    with pytest.raises(LeanError, match="no labels of its own"):
        task.loss(task.forward(bert_encoder, batch), batch)


def test_the_loss_towards_vectors_is_zero_at_them(bert_encoder, bert_tokenizer):
    task = made()
    batch = task.collate(bert_tokenizer, task.features(bert_tokenizer, "train")[:4])
    outputs = task.forward(bert_encoder, batch)
    torch.testing.assert_close(outputs.norm(dim=-1), torch.ones(4))
    assert task.loss(outputs, {"labels": outputs * 3}).item() == pytest.approx(0, abs=1e-6)
    assert task.loss(outputs, {"labels": -outputs}).item() == pytest.approx(2, abs=1e-6)


def test_pairs_as_objective(bert_encoder, bert_tokenizer):
    task, other = made(objective="pairs"), made()
    features = task.features(bert_tokenizer, "train")
    assert len(features) == len(TEXTS) and not task.needs_teacher
    batch = task.collate(bert_tokenizer, features[:6])
    outputs = task.forward(bert_encoder, batch)
    assert outputs.shape[0] == 12 and batch["labels"].tolist() == [6, 7, 8, 9, 10, 11]
    scores = outputs[:6] @ outputs[6:].T * 20
    torch.testing.assert_close(task.loss(outputs, batch), F.cross_entropy(scores, torch.arange(6)))
    predict = lambda batch: task.forward(bert_encoder, batch)  # noqa: E731
    assert task.evaluate(predict, bert_tokenizer) == other.evaluate(predict, bert_tokenizer)


def test_pooling_by_hand():
    states = torch.tensor([[[1.0], [3.0], [100.0]], [[2.0], [4.0], [6.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(states, mask).tolist() == [[2.0], [4.0]]
    assert pool(states, mask, "cls").tolist() == [[1.0], [2.0]]
    assert pool(states, mask, "lasttoken").tolist() == [[3.0], [6.0]]


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_sentence_transformers_opens_what_is_saved(mode, bert_tokenizer, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from transformers import BertModel

    model = build(BertModel, bert_config(bert_tokenizer))
    if mode != "mean":
        model.config.sentence_pooling = mode
    task = made()
    with pytest.raises(LeanError, match=r"save_pretrained there before"):
        task.save_extras(tmp_path, bert_tokenizer)
    model.save_pretrained(tmp_path)
    task.save_extras(tmp_path, bert_tokenizer)
    opened = library.SentenceTransformer(str(tmp_path), device="cpu")
    ours = task.vectors(lambda batch: task.forward(model, batch), bert_tokenizer)[1::2]
    theirs = torch.tensor(opened.encode(TEXTS[10:]))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    again, tokenizer = load(tmp_path, task)
    assert getattr(again.config, "sentence_pooling", "mean") == mode
    torch.testing.assert_close(
        task.vectors(lambda batch: task.forward(again, batch), tokenizer)[1::2], ours, rtol=1e-4, atol=1e-5
    )


def test_equal_bodies_count_as_one(bert_encoder, bert_tokenizer):
    """Many questions with the same answer are all answered by it."""
    rows = [{"query": f"{t} {i}", "body": t} for t in TEXTS[:4] for i in range(5)]
    task = Embedding("t", {"train": rows, "validation": rows, "test": rows}, max_length=32)
    vectors = torch.eye(4).repeat_interleave(5, dim=0)
    assert task.ndcg(vectors, vectors) == 1
    pytest.importorskip("sklearn")
    assert tfidf(task).quality > 0.9


def test_a_metric_that_needs_the_teacher_says_so(bert_encoder, bert_tokenizer):
    task = made(metric="old_index_ndcg@10")
    metrics = task.evaluate(lambda batch: task.forward(bert_encoder, batch), bert_tokenizer)
    with pytest.raises(LeanError, match="attach the teacher"):
        task.quality(metrics)
