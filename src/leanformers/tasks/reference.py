"""What a sensible person tries first: TF-IDF, with a linear model on top where there are labels.

No transformer, no GPU, milliseconds: a point that every frontier is shown beside.
"""

from __future__ import annotations

import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import LeanError
from .base import Task
from .embedding import Embedding, distinct
from .text import TextClassification, TextRegression

_BODIES = 1000  # queries compared at once


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A reference point.

    quality: the task's metric. latency: median seconds for one text by itself. bytes: of what has to be
    stored (vocabulary, weights), pickled. seconds: to fit.
    """

    name: str
    metrics: dict[str, float]
    quality: float
    latency: float
    bytes: int
    parameters: int
    seconds: float


def tfidf(task: Task, *, split: str = "test", limit: int | None = None, seed: int = 0) -> Reference | None:
    """TF-IDF (words and word pairs, sublinear counts) with logistic or ridge regression, or as a search
    index.

    Returns:
        None for language modelling and for texts alone, where TF-IDF has nothing to say.

    Raises:
        LeanError: scikit-learn is missing.
    """
    if isinstance(task, TextClassification | TextRegression):
        return _supervised(task, split, limit, seed)
    if isinstance(task, Embedding) and task.pairs:
        return _search(task, split, limit)
    return None


def _vectoriser() -> Any:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise LeanError("The TF-IDF reference needs scikit-learn: pip install scikit-learn.") from error
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, dtype=np.float32)


def _supervised(task: TextClassification | TextRegression, split: str, limit: int | None, seed: int) -> Reference:
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.metrics import accuracy_score, f1_score, mean_squared_error
    from sklearn.pipeline import make_pipeline

    from .metrics import spearman

    train, test = task.rows("train"), task.rows(split, limit)
    classify = isinstance(task, TextClassification)
    head = LogisticRegression(C=10.0, max_iter=1000, random_state=seed) if classify else Ridge(random_state=seed)
    model = make_pipeline(_vectoriser(), head)
    start = time.perf_counter()
    model.fit([row["text"] for row in train], [row["label"] for row in train])
    seconds = time.perf_counter() - start
    texts, right = [row["text"] for row in test], [row["label"] for row in test]
    predicted = model.predict(texts)
    if classify:
        metrics = {
            "accuracy": float(accuracy_score(right, predicted)),
            "macro_f1": float(f1_score(right, predicted, average="macro")),
        }
    else:
        import torch

        metrics = {
            "spearman": spearman(torch.tensor(predicted), torch.tensor(right)),
            "mse": float(mean_squared_error(right, predicted)),
        }
    return Reference(
        name="TF-IDF + " + ("logistic regression" if classify else "ridge regression"),
        metrics=metrics,
        quality=task.quality(metrics),
        latency=_latency(lambda text: model.predict([text]), texts),
        bytes=len(pickle.dumps(model)),
        parameters=int(head.coef_.size + np.size(head.intercept_)),
        seconds=seconds,
    )


def _search(task: Embedding, split: str, limit: int | None) -> Reference:
    rows = task.rows(split, limit)
    vectoriser = _vectoriser()
    start = time.perf_counter()
    places, relevant = distinct([row["body"] for row in rows])
    bodies = vectoriser.fit_transform([rows[i]["body"] for i in places])  # [bodies, terms], sparse
    seconds = time.perf_counter() - start
    queries = [row["query"] for row in rows]
    encoded = vectoriser.transform(queries)
    total = 0.0
    for first in range(0, len(rows), _BODIES):
        scores = (encoded[first : first + _BODIES] @ bodies.T).toarray()  # [chunk, bodies]
        own = scores[np.arange(len(scores)), relevant[first : first + _BODIES]]
        rank = (scores >= own[:, None]).sum(1)
        total += (1 / np.log2(1 + rank[rank <= 10])).sum()
    metrics = {"ndcg@10": float(total / len(rows))}
    return Reference(
        name="TF-IDF",
        metrics=metrics,
        quality=metrics["ndcg@10"],
        latency=_latency(lambda text: vectoriser.transform([text]), queries),
        bytes=len(pickle.dumps(vectoriser)),
        parameters=len(vectoriser.vocabulary_),
        seconds=seconds,
    )


def _latency(predict: Callable[[str], Any], texts: Sequence[str], times: int = 50) -> float:
    """Median seconds for one text, after a warm-up."""
    measured = []
    for i in range(times + 5):
        start = time.perf_counter()
        predict(texts[i % len(texts)])
        measured.append(time.perf_counter() - start)
    return statistics.median(measured[5:])
