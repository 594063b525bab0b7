"""Packed all-MiniLM-L6-v2 on the CPU: real docstrings of all lengths, at most 512 tokens, as they arrive.

Padded and length-sorted batches are timed in turns with packed ones, by what `leanformers measure --packed` calls. The
lengths found are kept: `bytetransformer_gpu.py` times BERT on them.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from claim import Evidence
from leanformers.measure.packed import compare_packed
from leanformers.packing import pack
from leanformers.tasks import load
from leanformers.tasks.docstrings import docstring_texts
from leanformers.tasks.embedding import Embedding

ROWS = 256
BATCHES = {16: 8, 64: 4}  # rows of a batch -> batches
SECONDS = 60.0

rows = [{"text": text} for text in docstring_texts(ROWS)]
task = Embedding("docstrings", {"train": [], "validation": [], "test": rows}, max_length=512)
model, tokenizer = load("minilm", task, dtype="float32")

with Evidence(
    "bytetransformer",
    claim="Without padding an encoder takes at most 1/1.3 of its time on a CPU where 60 % of the positions are real",
    paper="Zhai et al. (2023), ByteTransformer",
) as evidence:
    features = task.features(tokenizer, "test", ROWS)
    evidence.result["lengths"] = [len(feature["input_ids"]) for feature in features]
    batch = task.collate(tokenizer, features[:16])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        before = model.base_model(**inputs).last_hidden_state
        after = pack(model).base_model(**inputs).last_hidden_state
    difference = float((before - after)[real].abs().max())
    evidence.check("Largest difference of a state at a real token", difference, "<= 1e-5")
    evidence.check("Largest state at padding", float(after[~real].abs().max()), "== 0")
    for size, count in BATCHES.items():
        found = compare_packed(model, task, tokenizer, batch_size=size, batches=count, seconds=SECONDS)
        print(found.advice(), flush=True)
        name = f"batch {size}"
        evidence.baseline[name] = {"padded, seconds": found.padded, "length-sorted, seconds": found.sorted}
        evidence.result[name] = {**asdict(found), "over length-sorted": 1 / found.over_sorted}
        evidence.check(f"Real tokens among padded positions, {name}", found.real, "<= 0.6")
        evidence.check(f"Padded over packed, {name}", 1 / found.over_padded, ">= 1.3")
        evidence.check(f"Largest difference of a vector, {name}", found.difference, "<= 1e-5")
