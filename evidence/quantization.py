"""int8 by torchao: SmolLM2 weight-only, and a fine-tuned MiniLM with dynamic activations and int8 embeddings."""

from __future__ import annotations

from claim import Evidence
from common import perplexity, quality, subject, treat
from leanformers.measure.cost import bytes_of_state

ROWS = 32

with Evidence(
    "quantization",
    claim="int8 rows cost no quality, and a quarter of float32's bytes where they stand",
    paper="torchao 0.18: symmetric int8, one scale per output row",
) as evidence:
    language = subject("smollm2", "docstrings-lm", dtype="float32")
    dense = perplexity(language, ROWS)
    rows = treat(language, {"method": "quantization"})
    with_table = treat(language, {"method": "quantization", "embeddings": True})
    quantised = perplexity(rows, ROWS)
    both = perplexity(with_table, ROWS)

    tuned = treat(subject("minilm", "sentiment"), {"method": "fine-tune", "epochs": 2.0})
    dynamic = treat(tuned, {"method": "quantization", "scheme": "int8_dynamic"})
    table = treat(tuned, {"method": "quantization", "embeddings": True})
    accuracy, after, small = quality(tuned), quality(dynamic), quality(table)
    linears = sum(projection.weight().numel() for projection in tuned.anatomy.linears().values())
    saved = bytes_of_state(tuned.model) - bytes_of_state(dynamic.model)

    evidence.baseline = {"perplexity": dense, "accuracy": accuracy, "bytes": bytes_of_state(tuned.model)}
    evidence.result = {
        "perplexity_int8": quantised,
        "perplexity_int8_with_embeddings": both,
        "accuracy_int8_dynamic": after,
        "accuracy_int8_with_embeddings": small,
        "bytes_int8_with_embeddings": bytes_of_state(table.model),
    }
    evidence.check("SmolLM2: perplexity of int8 linears, ratio", quantised / dense, "<= 1.01")
    evidence.check("SmolLM2: perplexity of int8 linears and embeddings, ratio", both / dense, "<= 1.02")
    evidence.check("MiniLM: accuracy lost, dynamic, points", 100 * (accuracy - after), "<= 0.5")
    evidence.check("MiniLM: bytes of the linears, ratio", 1 - saved / (4 * linears), "<= 0.35")
    whole = bytes_of_state(table.model) / bytes_of_state(tuned.model)
    evidence.check("MiniLM: bytes of the model with int8 embeddings, ratio", whole, "<= 0.3")
