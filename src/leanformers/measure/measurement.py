"""What was measured of one model, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from leanformers.errors import LeanError

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Quality and cost of one model in one runtime. None means not measured.

    quality: the task's metric (`metric` names it); `better` says which direction is good.
    metrics: all that the task evaluated.
    parameters: number, tied ones once.
    bytes: of the weights on disk: the checkpoint's files where there is a folder, else the state dict.
    tokenizer_bytes: of the tokenizer's files, where a folder was measured.
    memory: bytes of parameters and buffers in memory.
    peak_memory: bytes; `memory` and the largest rise while running (see `measure.memory`).
    flops: per real token, the cost of padding included (multiply-add = 2).
    padding: share of padded positions in the batches that were counted.
    examples, tokens: rows and real tokens of those batches.
    latency: seconds per batch of `batch_size` rows, median; latency_p95: 95th percentile of single calls.
    latency_ratio: the ratio to the baseline that was timed in the same rounds, from pairs.
    latency_range: quartiles over the rounds of that ratio.
    throughput: real tokens per second.
    decode: new tokens per second of `generate` (causal language models, on request).
    """

    parameters: int
    bytes: int
    memory: int
    quality: float | None = None
    metric: str | None = None
    better: str = "higher"
    metrics: Mapping[str, float] = field(default_factory=dict)
    tokenizer_bytes: int | None = None
    peak_memory: int | None = None
    flops: float | None = None
    padding: float | None = None
    examples: int | None = None
    tokens: int | None = None
    latency: float | None = None
    latency_p95: float | None = None
    latency_ratio: float | None = None
    latency_range: tuple[float, float] | None = None
    throughput: float | None = None
    decode: float | None = None
    runtime: str = "torch"
    device: str = "cpu"
    dtype: str | None = None
    batch_size: int | None = None
    threads: int | None = None
    rounds: int | None = None

    def ratios(self, baseline: Measurement) -> dict[str, float]:
        """Each metric as a ratio to the baseline's; only those that both have.

        quality is turned so that more is better whatever the metric's direction. latency is the one taken
        within rounds where the two were timed together. flops and throughput are for the same texts, so that
        models whose tokenizers differ compare.
        """
        found: dict[str, float] = {}
        for name in ("parameters", "bytes", "memory", "peak_memory", "latency", "latency_p95", "decode"):
            own, other = getattr(self, name), getattr(baseline, name)
            if own is not None and other is not None:
                found[name] = _ratio(own, other)
        if self.quality is not None and baseline.quality is not None:
            pair = (self.quality, baseline.quality)
            found["quality"] = _ratio(*pair) if self.better == "higher" else _ratio(*reversed(pair))
        if self.latency_ratio is not None and "latency" in found:
            found["latency"] = self.latency_ratio / (baseline.latency_ratio or 1.0)
        same_texts = _ratio(self._tokens_per_example(), baseline._tokens_per_example())
        if self.flops is not None and baseline.flops is not None:
            found["flops"] = _ratio(self.flops, baseline.flops) * same_texts
        if self.throughput is not None and baseline.throughput is not None:
            found["throughput"] = _ratio(self.throughput, baseline.throughput) / same_texts
        return found

    def _tokens_per_example(self) -> float:
        return self.tokens / self.examples if self.tokens and self.examples else 1.0

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `json.dumps` takes; `from_json` reads it back."""
        data = asdict(self)
        data["metrics"] = dict(self.metrics)
        if self.latency_range is not None:
            data["latency_range"] = list(self.latency_range)
        return {"version": VERSION, **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Measurement:
        """Read what `to_json` wrote, a dict or its text; LeanError names a missing or unknown field."""
        values = dict(json.loads(data) if isinstance(data, str) else data)
        version = values.pop("version", VERSION)
        if version != VERSION:
            raise LeanError(
                f"The measurement is of version {version}, this leanformers reads {VERSION}: measure again."
            )
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise LeanError(f"The measurement has an unknown field {unknown[0]!r}: measure again.")
        if missing := sorted({"parameters", "bytes", "memory"} - set(values)):
            raise LeanError(f"The measurement lacks the field {missing[0]!r}: measure again.")
        if values.get("latency_range") is not None:
            values["latency_range"] = tuple(values["latency_range"])
        return cls(**values)


def _ratio(own: float, other: float) -> float:
    if other == 0:
        return 1.0 if own == 0 else float("inf")
    return own / other
