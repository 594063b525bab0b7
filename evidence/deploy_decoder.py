"""A slimmed decoder in llama.cpp against the unslimmed one, quantised: SmolLM2-135M on the CPU.

Slimmed: fewer words in the vocabulary, fewer layers, then tuned on the documentation that it is to write; unslimmed:
as it is, not tuned, in q8_0 and q4_k_m; beside them the whole model, tuned as the slimmed one was. Bits per byte are
of held-out docstrings, through llama.cpp; decoding is in tokens and in bytes of text per second, since a smaller
vocabulary needs more tokens for a text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from claim import Evidence
from making import arguments, make, side_by_side, steps_of

KINDS = ("q8_0", "q4_k_m")
ROWS, PROMPTS, NEW_TOKENS = 40, 8, 48
TUNE = {"method": "fine-tune", "epochs": 2.0, "learning_rate": 3e-4, "batch_size": 16}


def slim(keep: float) -> list[dict[str, Any]]:
    return [{"method": "idt5", "coverage": 0.999}, {"method": "drop-layers", "keep": keep}, TUNE]


RECIPES: dict[str, list[dict[str, Any]]] = {"tuned": [TUNE], "layers-20": slim(0.67)}


def documentation() -> Any:
    from leanformers.tasks import task

    return task("docstrings-lm", size=12_000)


def make_all(folder: Path, workers: int, only: str | None) -> None:
    if only is not None:
        make(folder, "smollm2", documentation(), RECIPES[only], only)
    else:
        side_by_side(__file__, folder, list(RECIPES), workers)


def measured(folder: Path, name: str, source: Path | str, kind: str, task: Any) -> dict[str, Any]:
    """Bits per byte, file size and rates of one model in one format."""
    from leanformers.deploy import export, target
    from leanformers.runtimes.llama_cpp import rates
    from leanformers.tasks import load

    model, tokenizer = load(source, task)
    place = folder / "exports" / f"{name}-{kind}"
    if not place.is_dir():
        export((model, tokenizer), "gguf", place, task=task, quantize=kind, measure=False)
    ready = target("gguf").prepare(place, model, task, kind)
    metrics = task.evaluate(ready, tokenizer, "test", ROWS)
    texts = [row["text"] for row in task.rows("test")[:PROMPTS]]
    prompts = [tokenizer(text)["input_ids"][:128] for text in texts]
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    per_token = sum(len(text.encode()) for text in texts) / tokens
    speed = rates(place / "model.gguf", prompts, NEW_TOKENS)
    return {
        "bits_per_byte": metrics["bits_per_byte"],
        "bytes": (place / "model.gguf").stat().st_size,
        "prefill_tokens_per_second": speed["prefill"],
        "decode_tokens_per_second": speed["decode"],
        "decode_bytes_per_second": speed["decode"] * per_token,
    }


def dominated(point: dict[str, Any], others: list[dict[str, Any]]) -> bool:
    """Whether another is at least as good in bits per byte, size and decoding, by bytes of text."""
    return any(
        o["bits_per_byte"] <= point["bits_per_byte"]
        and o["bytes"] <= point["bytes"]
        and o["decode_bytes_per_second"] >= point["decode_bytes_per_second"]
        for o in others
    )


def main() -> None:
    given = arguments(__doc__, "runs/deploy-decoder")
    if given.make or given.only:
        make_all(given.folder, given.workers, given.only)
        return
    make_all(given.folder, given.workers, None)
    with Evidence(
        "deploy-decoder",
        claim="A slimmed SmolLM2 in llama.cpp is ahead of what quantisation alone gives",
        paper="leanformers; llama.cpp's q8_0 and q4_k_m",
        seeds=(0,),
    ) as evidence:
        task, folder = documentation(), given.folder
        models: dict[str, Path | str] = {"unslimmed": "smollm2", **{name: folder / name for name in RECIPES}}
        table = {f"{n}, {kind}": measured(folder, n, s, kind, task) for n, s in models.items() for kind in KINDS}
        plain = {name: row for name, row in table.items() if name.startswith("unslimmed")}
        tuned = {name: row for name, row in table.items() if name.startswith("tuned")}
        base, taught = plain["unslimmed, q8_0"], tuned["tuned, q8_0"]
        points = {}
        for name, row in table.items():
            if name.startswith("layers"):
                points[name] = {
                    "bits_per_byte": row["bits_per_byte"] / base["bits_per_byte"],
                    "decode": row["decode_tokens_per_second"] / base["decode_tokens_per_second"],
                    "decode_by_bytes": row["decode_bytes_per_second"] / base["decode_bytes_per_second"],
                    "bytes": row["bytes"] / base["bytes"],
                    "dominated_by_unslimmed": dominated(row, list(plain.values())),
                    "bits_per_byte_to_tuned": row["bits_per_byte"] / taught["bits_per_byte"],
                    "dominated_by_tuned": dominated(row, list(tuned.values())),
                }
        evidence.baseline = plain
        evidence.result = {
            "table": table,
            "ratios to unslimmed q8_0": points,
            "recipes": {name: steps_of(folder / name) for name in RECIPES},
        }
        good = [p for p in points.values() if p["bits_per_byte"] <= 1.05 and not p["dominated_by_unslimmed"]]
        evidence.check("Slimmed points at <= 1.05x bits per byte that no unslimmed one dominates", len(good), ">= 1")
        evidence.check("Decode of the best of them, tokens/s", max((p["decode"] for p in good), default=0), ">= 1.3")
        best = max((p["decode_by_bytes"] for p in good), default=0)
        evidence.check("Decode of the best of them, bytes of text per second", best, ">= 1.3")


if __name__ == "__main__":
    main()
