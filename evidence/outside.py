"""What one would use instead of a transformer: model2vec distilled from the same model, one vector a word.

Source: model2vec (PyPI, MIT), `model2vec.distill`. A classifier on it is a logistic regression. Its latency is of
texts, tokenising included, since that is how it is called; a graph's is of tokens.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from leanformers.tasks.checkpoints import checkpoint


def static(task: Any, sizes: tuple[int, ...], rounds: int = 40) -> dict[str, Any]:
    """Quality on the test rows, seconds for a batch of each size, bytes on disk."""
    from model2vec import StaticModel
    from model2vec.distill import distill_from_model
    from transformers import AutoModel, AutoTokenizer

    source = checkpoint("minilm")
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    static: StaticModel = distill_from_model(AutoModel.from_pretrained(source), tokenizer, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        static.save_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    if task.kind == "embedding":
        fields = {field: [row[field] for row in task.rows("test")] for field in ("query", "body")}
        queries, bodies = (normalize(torch.tensor(static.encode(texts))) for texts in fields.values())
        quality, texts = task.ndcg(queries, bodies), fields["body"]
        answer: Any = static.encode
    else:
        from sklearn.linear_model import LogisticRegression

        x, y = {}, {}
        for split in ("train", "test"):
            x[split] = static.encode([row["text"] for row in task.rows(split)])
            y[split] = [row["label"] for row in task.rows(split)]
        classifier = LogisticRegression(max_iter=2_000).fit(x["train"], y["train"])
        quality, texts = float(classifier.score(x["test"], y["test"])), [row["text"] for row in task.rows("test")]

        answer = lambda batch: classifier.predict(static.encode(batch))  # noqa: E731
    latency = {str(n): seconds(answer, [texts[i : i + n] for i in range(0, rounds * n, n)]) for n in sizes}
    return {"quality": quality, "latency": latency, "bytes": size}


def seconds(answer: Any, batches: list[list[str]]) -> float:
    """Median over batches, after a warm-up."""
    measured = []
    for batch in [*batches[:5], *batches]:
        start = time.perf_counter()
        answer(batch)
        measured.append(time.perf_counter() - start)
    return statistics.median(measured[5:])
