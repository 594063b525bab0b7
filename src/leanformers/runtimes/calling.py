"""What a task calls of a model, seen without running it, and a stand-in that answers the same call.

A runtime that runs one exported graph needs to know which module becomes the graph (an embedder's task calls
`model.base_model`, a classifier's the model itself) and with which arguments. The task itself says so: it is
handed a probe that stops at the first call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from leanformers.errors import Enough, LeanError
from leanformers.runtimes.base import Batch, Runnable
from leanformers.runtimes.torch import device_of

ROWS = 2  # of a sample: torch.export takes a size of one for a constant
LENGTH = 3  # at least, and not the number of rows, so that the two sizes cannot be taken for one


@dataclass(frozen=True)
class Call:
    """A call that a task makes: the module, and its keyword arguments (tensors, and flags such as use_cache)."""

    module: torch.nn.Module
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The arguments that are tensors."""
        return {name: value for name, value in self.kwargs.items() if isinstance(value, torch.Tensor)}


class _Probe:
    """Poses as a model for a task's forward, and stops it where it calls."""

    def __init__(self, model: Any, calls: list[Call]) -> None:
        self._model, self._calls = model, calls
        self.device = device_of(model)
        self.config = getattr(model, "config", None)

    @property
    def base_model(self) -> _Probe:
        return _Probe(self._model.base_model, self._calls)

    def __call__(self, **kwargs: Any) -> Any:
        self._calls.append(Call(self._model, kwargs))
        raise Enough


def call_of(task: Runnable, model: Any, batch: Batch) -> Call:
    """The call that `task.forward(model, batch)` makes; nothing is run.

    Raises:
        LeanError: the task calls neither the model nor its base model.
    """
    calls: list[Call] = []
    try:
        task.forward(_Probe(model, calls), batch)
    except Enough:
        return calls[0]
    except (AttributeError, TypeError) as error:
        raise LeanError(
            f"The task does more with a model than call it once ({error}), so it has no one graph."
        ) from error
    raise LeanError("The task never calls the model, so there is nothing to export: call model(**inputs) in forward.")


def sample_of(call: Call) -> dict[str, Any]:
    """Arguments to trace `call` with: its flags, and its tensors with `ROWS` rows and at least `LENGTH` columns."""
    sample = dict(call.kwargs)
    for name, tensor in call.tensors.items():
        rows = tensor[:ROWS] if len(tensor) >= ROWS else torch.cat([tensor] * ROWS)
        while _has_length(rows) and rows.shape[1] < LENGTH:
            rows = torch.cat([rows, rows], dim=1)
        sample[name] = rows.clone()
    return sample


def _has_length(tensor: torch.Tensor) -> bool:
    """Whether the second axis counts tokens or samples, [batch, length]; images and spectrograms have one size."""
    return tensor.dim() == 2


def dynamic_shapes(sample: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """Which axes of the sample's tensors vary: the rows, and the length, of source and target by themselves."""
    from torch.export import Dim

    shapes: dict[str, dict[int, Any]] = {}
    for name, value in sample.items():
        if isinstance(value, torch.Tensor):
            shapes[name] = {0: Dim.DYNAMIC}
            if _has_length(value):
                shapes[name][1] = Dim.DYNAMIC
    return shapes


class StandIn:
    """Poses as a model for a task's forward, and answers by `run(**tensors)`, whatever holds the graph.

    Args:
        run: takes the tensors that the graph was traced with, and returns what the module returned.
        names: of those tensors.
        config: of the model, which an embedder's pooling reads.
        device: where the graph takes its inputs.
    """

    def __init__(self, run: Callable[..., Any], names: frozenset[str], config: Any, device: torch.device) -> None:
        self._run, self._names = run, names
        self.config, self.device = config, device

    @property
    def base_model(self) -> StandIn:
        return self

    def __call__(self, **kwargs: Any) -> Any:
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        if tensors.keys() != self._names:
            raise LeanError(
                f"The exported graph takes {_listed(self._names)}, and this batch has {_listed(tensors)}: "
                "tokenise both alike, or export again."
            )
        return self._run(**tensors)


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
