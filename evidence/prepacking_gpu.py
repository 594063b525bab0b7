"""Packed prefill of SmolLM2-135M-Instruct on a GPU: 64 real docstrings as they arrive, cut to 512 tokens and whole.

The ways of `prepacking.py`, and the packed pass compiled, replayed from CUDA graphs, and both. Times in bfloat16, all
in turns, from texts to a cache and from texts to the first token; peak memory of each beside the model; then float32:
the largest difference of a cached state from the padded batch's, and greedy tokens prompt by prompt. `--small` runs it
on a CPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from typing import Any

import torch

import leanformers as lean
from claim import Evidence, arguments
from leanformers.packing.prefilling import Prefiller
from leanformers.tasks.docstrings import docstring_texts
from prepacking import NEW_TOKENS, PROMPTS, Bench, Call, differing, in_turns, medians, over

PACKED = "packed, varlen"
OPTIONS: dict[str, dict[str, bool]] = {
    PACKED: {},
    "packed, graphs": {"graphs": True},
    "packed, compiled": {"compile": True},
    "packed, compiled, graphs": {"compile": True, "graphs": True},
}
START = time.perf_counter()
COMPILING = 90.0  # seconds after which nothing new is compiled


def options_now(failed: dict[str, str], case: str) -> dict[str, dict[str, bool]]:
    """Those that there is time for."""
    late = time.perf_counter() - START > COMPILING
    kept = {way: options for way, options in OPTIONS.items() if not (late and options.get("compile"))}
    failed.update({f"{case}: {way}": "no time was left to compile" for way in OPTIONS if way not in kept})
    return kept


def peaks(calls: Mapping[str, Call]) -> dict[str, float]:
    """MiB that each call holds at most, beside what was there."""
    found = {}
    for name, call in calls.items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        found[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return found


def able(calls: dict[str, Call], failed: dict[str, str], case: str) -> dict[str, Call]:
    """Those that run here; a failure is recorded."""
    kept = {}
    for name, call in calls.items():
        try:
            call()
            kept[name] = call
        except Exception as error:  # whatever it is, the others go on
            failed[f"{case}: {name}"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:300]
            print(f"    {name} is left out: {failed[f'{case}: {name}']}", flush=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return kept


def states(cache: Any, lengths: list[int]) -> list[torch.Tensor]:
    """The cached states of all prompts' tokens but the last, layer by layer."""
    longest = max(lengths)
    place = torch.arange(longest - 1)
    real = place >= longest - torch.tensor(lengths)[:, None]
    return [
        part[:, :, : longest - 1].transpose(1, 2)[real.to(part.device)]
        for kv in cache.layers
        for part in (kv.keys, kv.values)
    ]


def case(evidence: Evidence, name: str, texts: list[str], longest: int, device: str, rounds: int) -> None:
    """One batch: times and memory in bfloat16."""
    bench = Bench(texts, longest, device, "bfloat16" if device == "cuda" else "float32")
    failed: dict[str, str] = evidence.result["left out"]
    prefillers = {way: Prefiller(bench.model, **options) for way, options in options_now(failed, name).items()}
    calls: dict[str, Call] = {"padded": bench.padded, "sorted by length": bench.sorted}
    calls |= {"position_ids, no cache": bench.by_position_ids}
    calls |= {way: lambda p=prefiller: bench.packed(p, "varlen") for way, prefiller in prefillers.items()}  # type: ignore[misc]
    calls["packed, dense"] = lambda: bench.packed(prefillers[PACKED], "dense")
    prepacked = lean.prepack(bench.model)
    first: dict[str, Call] = {
        "generate, packed": lambda: bench.generate(prepacked, 1),
        "generate, padded": lambda: bench.generate(bench.model, 1),
        "generate_batch": lambda: bench.generate_batch(1),
    }
    calls, first = able(calls, failed, name), able(first, failed, name)
    memory = peaks(calls) if device == "cuda" else {}
    taken, started = in_turns(calls, rounds, device, told=False), in_turns(first, rounds, device, told=False)
    share = prefillers[PACKED].share(prefillers[PACKED].read(bench.ids()), "varlen")
    print(f"{name}: {share:.3f} of the padded positions are computed", flush=True)
    for way, seconds in {**medians(taken), **medians(started)}.items():
        print(f"    {way:28s} {1e3 * seconds:9.2f} ms {memory.get(way, float('nan')):9.0f} MiB", flush=True)
    evidence.result[name] = {
        "share of the padded positions": share,
        "seconds to the cache": {way: s for way, s in medians(taken).items() if way.startswith("packed")},
        "seconds to the first token": {way: s for way, s in medians(started).items() if way.endswith("packed")},
        "peak memory, MiB": {way: m for way, m in memory.items() if way.startswith("packed")},
    }
    evidence.baseline[name] = {
        "seconds to the cache": {way: s for way, s in medians(taken).items() if not way.startswith("packed")},
        "seconds to the first token": {way: s for way, s in medians(started).items() if not way.endswith("packed")},
        "peak memory, MiB": {way: m for way, m in memory.items() if not way.startswith("packed")},
    }
    evidence.check(f"Padded over packed, {name}", over(taken, "padded", PACKED), ">= 1.5")
    if "position_ids, no cache" in taken:
        ratio = over(taken, "position_ids, no cache", PACKED)
        evidence.check(f"Packing by position_ids, which makes no cache, over packed, {name}", ratio, ">= 1")
    if "generate_batch" in started:
        ratio = over(started, "generate_batch", "generate, packed")
        evidence.check(f"To the first token, generate_batch over generate, packed, {name}", ratio, ">= 1")
    if memory:
        evidence.check(f"Peak memory, packed over padded, {name}", memory[PACKED] / memory["padded"], "< 1")


def exact(evidence: Evidence, texts: list[str], longest: int, device: str) -> None:
    """Float32: states and greedy tokens against the padded batch."""
    bench = Bench(texts, longest, device, "float32")
    expected = states(bench.padded().past_key_values, bench.lengths)
    failed: dict[str, str] = evidence.result["left out"]
    tokens = bench.generate(bench.model, NEW_TOKENS)
    for way, options in options_now(failed, "float32").items():
        prefiller = Prefiller(bench.model, **options)
        if not able({way: lambda p=prefiller: bench.packed(p)}, failed, "float32"):  # type: ignore[misc]
            continue
        found = states(bench.packed(prefiller).past_key_values, bench.lengths)
        worst = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
        evidence.check(f"Largest difference of a cached state, float32, {way}", worst, "<= 1e-3")
        differ = differing(tokens, bench.generate(lean.prepack(bench.model, **options), NEW_TOKENS))
        evidence.check(f"Prompts with other greedy tokens than padded, of {len(texts)}, {way}", differ, "== 0")
        print(f"float32, {way}: largest difference {worst:.2e}, {differ} prompts differ", flush=True)


def main() -> None:
    parser = arguments(__doc__, small="a dry run on a CPU")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.small:
        OPTIONS.pop("packed, compiled"), OPTIONS.pop("packed, compiled, graphs")
    texts = docstring_texts(4 if given.small else PROMPTS)
    cases = {"cut to 512": 512, "whole": 8192} if not given.small else {"cut to 24": 24}
    with Evidence(
        "prepacking-gpu",
        claim="Packed, 64 docstrings are prefilled at least 1.5 times as fast as padded on a GPU, in less memory",
        paper="Zhao et al. (2024), Prepacking, arXiv 2404.09529",
        folder=given.results,
    ) as evidence:
        evidence.result["left out"] = {}
        exact(evidence, texts, min(cases.values()), device)
        for name, longest in cases.items():
            gc.collect()
            case(evidence, name, texts, longest, device, 1 if given.small else given.rounds)


if __name__ == "__main__":
    main()
