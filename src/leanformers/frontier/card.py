"""The model card of a point: what it is, how it was made, what it measured, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ROWS = {
    "quality": "quality",
    "latency": "latency, s per batch",
    "bytes": "bytes on disk",
    "parameters": "parameters",
    "flops": "FLOPs per real token",
}


def model_card(
    point: Any, task: Mapping[str, Any], lines: list[str], others: Sequence[Any] = (), licence: str | None = None
) -> str:
    """Markdown with the front matter that model hubs read.

    lines: Python that loads the point. others: the same recipe in other runtimes. licence: of the base model.
    """
    from leanformers.measure.environment import describe
    from leanformers.report.zeros import zeros
    from leanformers.runtimes.llama_session import AMX

    recipe, measured = point.recipe, point.measurement
    steps = recipe.to_yaml().strip()
    base = recipe.model or ""
    rows = "\n".join(
        f"| {title} | {_number(getattr(measured, key))} | {_number(point.ratios.get(key))} |"
        for key, title in _ROWS.items()
        if getattr(measured, key, None) is not None
    )
    needs = {
        "stock": "A stock checkpoint: transformers alone loads it.",
        "lean": "A lean checkpoint: it loads after `import leanformers`, and refuses to load without.",
        "runtime": f"An export for the runtime {measured.runtime}, which runs it without leanformers.",
    }.get(point.tier or "", "")
    front = f"base_model: {base}\n" if base and "/" in base and not base.startswith((".", "/")) else ""
    front += f"license: {licence}\n" if licence else ""
    load = "\n".join(lines)
    told = f"\n{found}\n" if (found := zeros(recipe.steps)) else ""
    warned = f"\nOn processors with AMX: {AMX}\n" if measured.runtime.startswith("llama.cpp") else ""
    return f"""---
library_name: transformers
tags: [leanformers]
{front}---

# {point.name}

Made by leanformers from `{base}` for the task *{task.get("name", "")}* ({task.get("kind", "")}). {needs}

| | value | to the baseline |
|---|---|---|
{rows}

Quality is {task.get("metric", "the task's metric")} on the test split; latency is of the runtime {measured.runtime}, on
{describe()}.
{told}{_runtimes(others)}
```python
{load}
```
{warned}
The recipe, which makes it again ({_again(point.tier, measured.runtime)}):

```yaml
{steps}
```
"""


def _again(tier: str | None, runtime: str) -> str:
    """The commands that make a point of its recipe."""
    from leanformers.deploy import DEPLOYED

    apply = "`leanformers apply recipe.yaml --out DIR`"
    if tier != "runtime" or runtime not in DEPLOYED:
        return apply
    to, quantize = DEPLOYED[runtime]
    options = f" --quantize {quantize}" if quantize else ""
    return f"{apply}, then `leanformers export DIR --to {to}{options} --out OUT`"


def licence_of(base: str | None) -> str | None:
    """The licence that the card of a base model's folder states in its front matter; None where it states none."""
    import yaml

    from leanformers.tasks.checkpoints import MODELS, checkpoint

    if not base:
        return None
    card = (checkpoint(base) if base in MODELS else Path(base).expanduser()) / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text("utf-8", errors="replace").split("---")
    try:
        front = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else None
    except yaml.YAMLError:
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) and found.isprintable() else None


def _runtimes(points: Sequence[Any]) -> str:
    """The same recipe in other runtimes, as a table."""
    if not points:
        return ""
    lines = ["", "The same recipe elsewhere, measured beside it on the same machine:", ""]
    lines += ["| runtime | quality | latency, s per batch | to the baseline | bytes |", "|---|---|---|---|---|"]
    for point in points:
        measured = point.measurement
        cells = (measured.quality, measured.latency, point.ratios.get("latency"), measured.bytes)
        lines.append(f"| {measured.runtime} | " + " | ".join(map(_number, cells)) + " |")
    return "\n".join([*lines, ""])


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
