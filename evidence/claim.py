"""Runs a paper's claim against its baseline and writes what came out, whether it held or not.

    from claim import Evidence

    with Evidence("greenformers", claim="…", paper="…", seeds=[0]) as e:
        e.baseline = {"accuracy": 0.86, "latency": 0.04}
        e.result = {"accuracy": 0.85, "latency": 0.02}
        e.check("accuracy, share of the baseline's", 0.85 / 0.86, ">= 0.98")
        e.check("rank is monotone", ranks, lambda r: r == sorted(r), "in rising order")

The file `results/<slug>.json` beside this one is written when the block ends without an error, to a
temporary name first. `holds` is computed from the measured value and the requirement, never given.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

RESULTS = Path(__file__).parent / "results"
_SIGNS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_REQUIRED = re.compile(r"^\s*(<=|>=|==|!=|<|>)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*$")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that the claim says, and what was measured of it."""

    name: str
    required: str
    measured: Any
    holds: bool


class Evidence:
    """A claim under test. `baseline` and `result` are mappings of names to numbers, or measurements.

    slug: the method's. claim: what the paper says, as it is tested here. paper: authors, year, title. seeds:
    all that were used. cause: set it where the claim does not hold, to what is thought to be the cause.
    """

    def __init__(
        self, slug: str, *, claim: str, paper: str, seeds: Sequence[int] = (0,), folder: Path | None = None
    ) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", slug):
            raise ValueError(f"the slug {slug!r} must be small letters, digits and hyphens")
        self.slug, self.claim, self.paper, self.seeds = slug, claim, paper, list(seeds)
        self.folder = folder or RESULTS
        self.baseline: Any = {}
        self.result: Any = {}
        self.cause: str | None = None
        self.checks: list[Check] = []
        self._start = time.perf_counter()

    def check(
        self,
        name: str,
        measured: Any,
        required: str | Callable[[Any], bool],
        words: str | None = None,
    ) -> bool:
        """Test one thing and record it; says whether it holds.

        required: a sign and a number (">= 0.98"), or a function of the measured value, described by `words`.
        A value that is not a number holds nothing.
        """
        plain = _plain(measured)
        if callable(required):
            if words is None:
                raise ValueError(f"check {name!r}: say in words what the function requires")
            holds, text = bool(required(measured)), words
        else:
            parsed = _REQUIRED.match(required)
            if parsed is None:
                raise ValueError(f"check {name!r}: {required!r} is no sign and number, such as '>= 0.98'")
            if isinstance(plain, bool) or not isinstance(plain, int | float | None):
                raise TypeError(f"check {name!r}: {measured!r} is no number to hold against {required!r}")
            holds = plain is not None and _SIGNS[parsed[1]](plain, float(parsed[2]))
            text = f"{parsed[1]} {parsed[2]}"
        if any(check.name == name for check in self.checks):
            raise ValueError(f"check {name!r} is there already")
        self.checks.append(Check(name=name, required=text, measured=plain, holds=holds))
        return holds

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return bool(self.checks) and all(check.holds for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """What is written: plain values only."""
        from leanformers.measure import environment

        if not self.checks:
            raise ValueError(f"the evidence of {self.slug} checks nothing")
        data = {
            "slug": self.slug,
            "claim": self.claim,
            "paper": self.paper,
            "checks": [asdict(check) for check in self.checks],
            "baseline": _plain(self.baseline),
            "result": _plain(self.result),
            "seeds": self.seeds,
            "seconds": round(time.perf_counter() - self._start, 1),
            **environment(),
        }
        if self.cause:
            data["cause"] = self.cause
        return data

    def write(self) -> Path:
        """Write results/<slug>.json, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.slug}.json"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
            temporary.write_text(text + "\n", "utf-8")
            return temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            path = self.write()
            for check in self.checks:
                told = f"{check.name}: {check.measured} (required {check.required})"
                print(f"{'holds' if check.holds else 'FAILS'}  {told}")
            print(f"{path} written: {'held' if self.holds else 'not held'}")


def arguments(doc: str | None, small: str | None = "a dry run on a small machine") -> argparse.ArgumentParser:
    """What a script can be told: where its result goes, and `--small` for a dry run, which `small` describes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if small is not None:
        parser.add_argument("--small", action="store_true", help=small)
    parser.add_argument("--results", type=Path, default=None, help="where the result is written")
    return parser


def _plain(value: Any) -> Any:
    """Numbers, texts, lists and mappings as JSON has them; a number that JSON cannot hold becomes None."""
    if hasattr(value, "to_json"):
        return _plain(value.to_json())
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # numpy's and torch's scalars
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | bool | int | float | None) else str(value)
