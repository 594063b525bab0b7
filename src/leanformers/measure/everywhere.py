"""One model in several runtimes, timed in the same rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leanformers.errors import LeanError
from leanformers.measure.batches import real_batches
from leanformers.measure.measurement import Measurement
from leanformers.measure.run import compare
from leanformers.runtimes import available, check, prepare


def everywhere(
    model: Any, tokenizer: Any, task: Any, runtimes: Sequence[str] = ("all",), **options: Any
) -> tuple[dict[str, Measurement], dict[str, str]]:
    """Measure a model in each of these runtimes.

    Args:
        model: a loaded one. tokenizer: its own. task: a Task.
        runtimes: names of `leanformers.runtimes`; "all" is what is installed here. torch comes first, and ratios of
            latency are to it, or to the first that runs where it is not among them.
        options: of `leanformers.measure.compare`. Bytes are those of the model as it was given,
            memory is that of the weights which the runtime holds.

    Returns:
        What was measured, by runtime, and why the others do not run this model, by runtime (of "all" alone).

    Raises:
        LeanError: an unknown runtime, one that is not installed, or one asked for by name that cannot run the model.
    """
    names = list(dict.fromkeys(available() if "all" in runtimes else runtimes))
    names.sort(key=lambda name: name != "torch")
    for name in names:
        check(name)
    size, split = options.get("batch_size", 16), options.get("split", "test")
    first = real_batches(task, {"model": tokenizer}, batch_size=size, count=1, split=split)["model"].batches[0]
    ready, refused = {}, {}
    for name in names:
        try:
            prepared = prepare(model, task, name)
            prepared(first)  # exports, compiles and finds out what cannot be
        except LeanError as error:
            if "all" not in runtimes:
                raise
            refused[name] = str(error)
            continue
        ready[name] = (prepared, tokenizer)
    return (compare(ready, task, **options) if ready else {}), refused
