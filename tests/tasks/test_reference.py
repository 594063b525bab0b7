import numpy as np
import pytest

from leanformers.tasks import task, tfidf
from leanformers.tasks.embedding import Embedding
from leanformers.tasks.language import CausalLM

from .tiny import sentences

text = pytest.importorskip("sklearn.feature_extraction.text")
TEXTS = [t for t, _ in sentences(60, seed=4)]


def test_a_task_of_words_is_solved_by_words(labelled):
    found = tfidf(task(labelled))
    assert found.quality == found.metrics["accuracy"] > 0.8
    assert found.name == "TF-IDF + logistic regression" and 0 < found.latency < 0.1 and found.bytes > 1_000


def test_ratings(csv):
    path = csv(
        ("text", "label"),
        [(t, (1.5 if y == "pos" else -1.5) + i / 1000) for i, (t, y) in enumerate(sentences(200))],
    )
    assert tfidf(task(path)).metrics["spearman"] > 0.5


def test_search_agrees_with_sklearn():
    rows = [{"query": " ".join(t.split()[:3]), "body": t} for t in TEXTS]
    made = Embedding("t", {"train": [], "validation": [], "test": rows})
    vectors = text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    bodies = vectors.fit_transform(r["body"] for r in rows)
    scores = (vectors.transform(r["query"] for r in rows) @ bodies.T).toarray()
    scores += np.random.default_rng(0).uniform(0, 1e-9, scores.shape)  # ties: they share, we count them against
    from sklearn.metrics import ndcg_score

    assert tfidf(made).metrics["ndcg@10"] == pytest.approx(ndcg_score(np.eye(60), scores, k=10), abs=0.05)


def test_nothing_to_say_about_language_models():
    assert tfidf(CausalLM("t", {"train": [], "test": [{"text": "a"}]})) is None
    assert tfidf(Embedding("t", {"train": [{"text": "a"}], "test": []})) is None
