"""Packed prefill of SmolLM2-135M-Instruct: 64 real docstrings in the order in which they arrive.

From texts to a cache, tokenisation and packing included, no logits: the padded batch, batches sorted by length, packed
prompts on both paths, and transformers' own packing by restarted `position_ids`, which makes no cache. Then to the
first token: `generate` packed, and `generate_batch`. All in turns; medians of ratios over rounds. Greedy output is
compared prompt by prompt in float32. Texts are cut to 512 tokens; `prepacking_gpu.py` runs the same on a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

import leanformers as lean
from claim import Evidence, arguments
from leanformers.packing import first_fit_decreasing
from leanformers.packing.prefilling import Prefiller
from leanformers.tasks import load
from leanformers.tasks.docstrings import docstring_texts

PROMPTS, LONGEST, SORTED = 64, 512, 16  # SORTED: rows of a batch of neighbours in length
NEW_TOKENS = 20
Call = Callable[[], Any]


class Bench:
    """A model, texts, and every way to prefill them."""

    def __init__(self, texts: list[str], longest: int, device: str, dtype: str) -> None:
        loaded: Any = load("smollm2", None, dtype)
        self.model, self.tokenizer = loaded[0].to(device).eval(), loaded[1]
        self.tokenizer.padding_side = "left"
        self.texts, self.longest, self.device = texts, longest, device
        self.lengths = [len(row) for row in self.ids()]

    def ids(self) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(self.texts, truncation=True, max_length=self.longest)["input_ids"]
        return found

    def batch(self, ids: list[list[int]] | None = None) -> Any:
        """Padded on the left."""
        return self.tokenizer.pad({"input_ids": self.ids() if ids is None else ids}, return_tensors="pt").to(
            self.device
        )

    def forward(self, **inputs: Any) -> Any:
        with torch.no_grad():
            return self.model.base_model(**inputs)

    def padded(self, ids: list[list[int]] | None = None) -> Any:
        """Positions count real tokens, as `generate` has them."""
        batch = self.batch(ids)
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return self.forward(**batch, position_ids=positions, use_cache=True)

    def sorted(self) -> Any:
        """Length-ordered batches: all the prompts must be there before the first begins."""
        ids = sorted(self.ids(), key=len)
        return [self.padded(ids[low : low + SORTED]) for low in range(0, len(ids), SORTED)]

    def packed(self, prefiller: Prefiller, path: str | None = None) -> Any:
        return prefiller(self.ids(), path=path)

    def by_position_ids(self) -> Any:
        """Rows as long as the longest prompt, without mask and cache, or transformers would not look at the positions.

        It makes a mask of all rows by itself. Nothing can be generated from it.
        """
        ids = self.ids()
        bins = first_fit_decreasing([len(row) for row in ids], max(map(len, ids)))
        size = max(sum(len(ids[i]) for i in held) for held in bins)
        rows, places = torch.zeros(2, len(bins), size, dtype=torch.int64)
        for row, held in enumerate(bins):
            flat = [token for i in held for token in ids[i]]
            inside = [place for i in held for place in range(len(ids[i]))]
            rows[row, : len(flat)], places[row, : len(flat)] = torch.tensor(flat), torch.tensor(inside)
            places[row, len(flat) :] = torch.arange(size - len(flat))
        return self.forward(input_ids=rows.to(self.device), position_ids=places.to(self.device), use_cache=False)

    def generate(self, model: Any, count: int) -> list[list[int]]:
        options = {"do_sample": False, "min_new_tokens": count, "pad_token_id": self.tokenizer.pad_token_id}
        written: list[list[int]] = model.generate(**self.batch(), max_new_tokens=count, **options)[:, -count:].tolist()
        return written

    def generate_batch(self, count: int) -> list[list[int]]:
        """Continuous batching, its cache cut to what these prompts need."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        pages = sum(-(-(length + count) // 256) for length in self.lengths)
        config = ContinuousBatchingConfig(
            num_blocks=pages + 8, max_batch_tokens=2048 if self.device == "cuda" else 1024
        )
        asked = GenerationConfig(
            max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=self.tokenizer.pad_token_id
        )
        found = self.model.generate_batch(self.ids(), generation_config=asked, continuous_batching_config=config)
        order = sorted(found, key=lambda name: int(name.split("_")[-1]))
        errors = [found[name].error for name in order if found[name].error]
        if errors:
            raise RuntimeError(errors[0])
        return [list(found[name].generated_tokens) for name in order]


def in_turns(calls: Mapping[str, Call], rounds: int, device: str, told: bool = True) -> dict[str, list[float]]:
    """Seconds of each call, all in turns, in an order that rotates; a first round warms up on a GPU."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    warm = 2 if device == "cuda" else 0
    for turn in range(rounds + warm):
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _wait(device)
            began = time.perf_counter()
            calls[name]()
            _wait(device)
            seconds = time.perf_counter() - began
            if turn >= warm:
                taken[name].append(seconds)
                if told:
                    print(f"    round {turn - warm}, {name}: {seconds:.3f} s", flush=True)
    return taken


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def medians(taken: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def over(taken: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of one's time over another's."""
    return statistics.median(one / two for one, two in zip(taken[name], taken[base], strict=True))


def differing(one: list[list[int]], other: list[list[int]]) -> int:
    """Prompts whose tokens differ."""
    return sum(a != b for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = arguments(__doc__, small=None)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=LONGEST)
    given = parser.parse_args()
    bench = Bench(docstring_texts(given.prompts), given.longest, "cpu", "float32")
    prefiller, prepacked = Prefiller(bench.model), lean.prepack(bench.model)
    with Evidence(
        "prepacking",
        claim="Packed, 64 docstrings are prefilled at least 1.5 times as fast as padded on a CPU, and continue alike",
        paper="Zhao et al. (2024), Prepacking, arXiv 2404.09529",
        folder=given.results,
    ) as evidence:
        taken = in_turns(
            {
                "padded": bench.padded,
                "packed, varlen": lambda: bench.packed(prefiller, "varlen"),
                "packed, dense": lambda: bench.packed(prefiller, "dense"),
                "sorted by length": bench.sorted,
                "position_ids, no cache": bench.by_position_ids,
            },
            given.rounds,
            "cpu",
        )
        first = in_turns(
            {
                "generate_batch": lambda: bench.generate_batch(1),
                "generate, packed": lambda: bench.generate(prepacked, 1),
            },
            min(given.rounds, 2),
            "cpu",
        )
        report(evidence, bench, prefiller, taken, first)
        expected = bench.generate(bench.model, NEW_TOKENS)
        differ = differing(expected, bench.generate(prepacked, NEW_TOKENS))
        evidence.check(f"Prompts with other greedy tokens than padded, of {given.prompts}", differ, "== 0")
        continuous = differing(expected, bench.generate_batch(NEW_TOKENS))
        evidence.baseline["prompts with other greedy tokens, generate_batch"] = continuous


def report(
    evidence: Evidence, bench: Bench, prefiller: Prefiller, taken: dict[str, list[float]], first: dict[str, list[float]]
) -> None:
    """Seconds and the ratios that are required, of one batch."""
    prompts = prefiller.read(bench.ids())
    share = prefiller.share(prompts, "varlen")
    evidence.result["lengths"] = bench.lengths
    evidence.result["share of the padded positions"] = {
        path: prefiller.share(prompts, path) for path in ("varlen", "dense")
    }
    evidence.result["seconds to the cache"] = {n: s for n, s in medians(taken).items() if n.startswith("packed")}
    evidence.baseline["seconds to the cache"] = {n: s for n, s in medians(taken).items() if not n.startswith("packed")}
    evidence.result["seconds to the first token"] = {n: s for n, s in medians(first).items() if n.endswith("packed")}
    others = {n: s for n, s in medians(first).items() if not n.endswith("packed")}
    evidence.baseline["seconds to the first token"] = others
    packed = "packed, varlen"
    evidence.result["over packed"] = {name: over(taken, name, packed) for name in taken if name != packed}
    evidence.check("Share of the padded positions that is computed", share, "<= 0.5")
    evidence.check("Padded over packed", over(taken, "padded", packed), ">= 1.5")
    evidence.check(
        "Packing by position_ids, which makes no cache, over packed",
        over(taken, "position_ids, no cache", packed),
        ">= 1",
    )
    ratio = over(first, "generate_batch", "generate, packed")
    evidence.check("To the first token, generate_batch over generate, packed", ratio, ">= 1")


if __name__ == "__main__":
    main()
