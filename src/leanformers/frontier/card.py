"""The model card of a point: what it is, how it was made, what it measured, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ROWS = {
    "quality": "quality",
    "latency": "latency, s per batch",
    "bytes": "bytes on disk",
    "parameters": "parameters",
    "flops": "FLOPs per real token",
}


def model_card(point: Any, task: Mapping[str, Any], lines: list[str]) -> str:
    """Markdown with the front matter that model hubs read; `lines`: Python that loads the point."""
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
    }.get(point.tier or "", "")
    front = f"base_model: {base}\n" if base and "/" in base and not base.startswith((".", "/")) else ""
    load = "\n".join(lines)
    return f"""---
library_name: transformers
tags: [leanformers]
{front}---

# {point.name}

Made by leanformers from `{base}` for the task *{task.get("name", "")}* ({task.get("kind", "")}). {needs}

| | value | to the baseline |
|---|---|---|
{rows}

Quality is {task.get("metric", "the task's metric")} on the test split. The machine is in `environment.json`.

```python
{load}
```

The recipe, which makes it again (`leanformers apply recipe.yaml --out DIR`):

```yaml
{steps}
```
"""


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
