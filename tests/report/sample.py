"""A made-up run, of the shape that a search writes; none of its numbers was measured."""

from __future__ import annotations

import copy
from typing import Any

BASE = {
    "quality": 0.869, "latency": 0.0412, "bytes": 90_900_000, "parameters": 22_713_986, "flops": 21_500_000.0,
    "memory": 90_860_000, "throughput": 14_200.0, "latency_p95": 0.047, "peak_memory": 131_000_000,
    "metrics": {"accuracy": 0.869}, "runtime": "torch",
}  # fmt: skip


def point(mark: str, status: str, ratios: dict[str, float], steps: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    name = "+".join(step["method"] for step in steps) + f"-{mark}"  # as a search names it
    measurement = {key: BASE[key] * share for key, share in ratios.items()}
    return {
        "name": name, "status": status, "recipe": {"seed": 0, "steps": steps}, "measurement": measurement,
        "ratios": dict(ratios), "tier": "lean", "folder": f"points/{name}", "reason": None, **more,
    }  # fmt: skip


def ratios(quality: float, latency: float, size: float, parameters: float, flops: float) -> dict[str, float]:
    return {"quality": quality, "latency": latency, "bytes": size, "parameters": parameters, "flops": flops}


_DISTIL = {"method": "distillation", "epochs": 2, "learning_rate": 0.0001, "temperature": 2.0}

DATA: dict[str, Any] = {
    "schema": 1, "name": "demo", "model": "minilm", "status": "complete", "seed": 0, "seconds": 511.0,
    "created": "2026-01-02T03:04:05Z", "best": "idt5+optin+distillation+quantization-p3",
    "command": "leanformers slim --model minilm --task sentiment --goal 'latency<=0.6x' --goal 'bytes<=0.3x'",
    "task": {
        "name": "sentiment", "kind": "text-classification", "metric": "accuracy", "better": "higher",
        "rows": {"train": 6000, "validation": 1000, "test": 2000},
    },
    "goals": ["latency<=0.6x", "bytes<=0.3x", "quality>=0.98x"],
    "objectives": ["quality", "latency", "bytes"],
    "skipped": {"essential": "it does not suit text-classification tasks"},
    "environment": {
        "hardware": {
            "cpu": "A made-up processor", "instruction_sets": ["avx2", "fma"], "threads": 2, "memory": 25_000_000_000,
            "gpus": [],
        },
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"}, "commit": None,
    },
    "baseline": {
        "name": "baseline", "status": "baseline", "recipe": None, "measurement": BASE, "tier": "stock",
        "ratios": {key: 1.0 for key in BASE if key not in ("metrics", "runtime")}, "folder": "baseline", "reason": None,
    },
    "references": [{
        "name": "TF-IDF", "status": "reference", "recipe": None, "tier": None, "folder": None, "reason": None,
        "measurement": {"quality": 0.764, "latency": None, "bytes": 1_900_000, "parameters": 24_000},
        "ratios": {"quality": 0.879, "bytes": 0.021, "parameters": 0.0011},
    }],
    "points": [
        point("p1", "frontier", ratios(0.995, 0.78, 0.52, 0.52, 0.79),
              [{"method": "idt5", "vocabulary": 8000}, {"method": "optin", "flops": 0.8}], meets=False),
        point("p2", "frontier", ratios(0.981, 0.535, 0.34, 0.34, 0.5),
              [{"method": "idt5", "vocabulary": 8000}, {"method": "drop-layers", "keep": [0, 2, 5]}, _DISTIL]),
        point("p3", "frontier", ratios(0.983, 0.565, 0.21, 0.5, 0.62),
              [{"method": "idt5", "vocabulary": 8000}, {"method": "optin", "flops": 0.6}, _DISTIL,
               {"method": "quantization", "scheme": "int8_weight_only"}], meets=True),
        point("p4", "frontier", ratios(0.952, 0.31, 0.12, 0.2, 0.25),
              [{"method": "drop-layers", "keep": [0, 5]}, _DISTIL, {"method": "quantization", "scheme": "int8_dynamic"}],
              tier="stock"),
        *(point(f"t{i}", "dominated", ratios(0.90 + 0.006 * i, 0.5 + 0.07 * i, 0.4 + 0.05 * i, 0.4 + 0.05 * i, 0.5 + 0.05 * i),
                [{"method": "greenformers", "rank": 0.1 * (i + 1), "solver": "svd"}, _DISTIL]) for i in range(7)),
        point("t8", "dominated", ratios(0.61, 0.44, 0.4, 0.4, 0.45), [{"method": "essential-sparsity", "sparsity": 0.9}],
              reason="sparsity 0.9 without retraining loses too much: p4 is faster and better"),
        *(point(f"e{i}", "estimated", ratios(0.72 + 0.02 * i, 0.35 + 0.05 * i, 0.3, 0.3, 0.4), [{"method": "optin", "flops": 0.3}],
                folder=None) for i in range(6)),
        {"name": "quantization-x1", "status": "failed", "recipe": {"steps": [{"method": "quantization", "scheme": "int4"}]},
         "measurement": None, "ratios": {}, "tier": None, "folder": None,
         "reason": "int4 weight-only does not run on this CPU"},
    ],
}  # fmt: skip


def sample() -> dict[str, Any]:
    """A fresh copy, to be changed freely."""
    return copy.deepcopy(DATA)
