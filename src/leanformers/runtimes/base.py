"""The registry of runtimes: where a model is run, and what runs it there.

A runtime is one file of this folder. It holds a function that takes a model and a task and returns a
`Prepared`, and registers it by name:

    @runtime("torch")
    def prepare(model, task) -> Prepared: ...

Everything that times or evaluates a model calls it through a `Prepared`, so that a new runtime is measured
and searched over without another line elsewhere. Nothing is imported here but the standard library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from leanformers.errors import LeanError

if TYPE_CHECKING:
    import torch

Batch = dict[str, Any]


class Runnable(Protocol):
    """What a runtime needs of a task."""

    def forward(self, model: Any, batch: Batch) -> torch.Tensor: ...


def place(batch: Batch, device: torch.device) -> Batch:
    """The same batch with its tensors on `device` (no copy where they are there already)."""
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model made ready in one runtime: call it with a batch, get the tensor that its task compares.

    `call` takes a batch whose tensors are already on `device` and returns the task's output (logits
    `[batch, classes]`, embeddings `[batch, dim]` or logits `[batch, length, vocab]`) without gradients.
    `source` is the model that was prepared. `by_batch`: what a row is answered depends on the rows beside it, since
    activations are rounded by one range per batch; its quality is then that of batches of one size. `held()`: bytes of
    the weights that the runtime holds instead of the model's, None while it has none (before the first batch).
    """

    name: str
    call: Callable[[Batch], torch.Tensor]
    device: torch.device
    source: Any
    details: Mapping[str, str] = field(default_factory=dict)
    by_batch: bool = False
    held: Callable[[], int | None] = lambda: None

    def place(self, batch: Batch) -> Batch:
        """The same batch with its tensors on this runtime's device (no copy where they are there already)."""
        return place(batch, self.device)

    def __call__(self, batch: Batch) -> torch.Tensor:
        return self.call(self.place(batch))

    def describe(self) -> str:
        """One line for a report: name, device and what else matters, such as the attention implementation."""
        parts = [str(self.device), *(f"{key} {value}" for key, value in self.details.items())]
        return f"{self.name} ({', '.join(parts)})"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A registered runtime; `refusal()` is None where it can run here, else one sentence with the remedy."""

    name: str
    summary: str
    build: Callable[[Any, Runnable], Prepared]
    refusal: Callable[[], str | None]


_RUNTIMES: dict[str, Runtime] = {}


def _always() -> str | None:
    return None


def runtime(
    name: str, *, refusal: Callable[[], str | None] = _always
) -> Callable[[Callable[[Any, Runnable], Prepared]], Callable[[Any, Runnable], Prepared]]:
    """Register the decorated function as the runtime `name`; its docstring's first line is the summary."""

    def register(build: Callable[[Any, Runnable], Prepared]) -> Callable[[Any, Runnable], Prepared]:
        if name in _RUNTIMES:
            raise ValueError(f"the runtime {name!r} is registered twice")
        summary = (build.__doc__ or "").strip().split("\n")[0]
        _RUNTIMES[name] = Runtime(name=name, summary=summary, build=build, refusal=refusal)
        return build

    return register


def runtimes() -> dict[str, Runtime]:
    """All registered runtimes by name, whether or not they can run here."""
    return dict(_RUNTIMES)


def available() -> list[str]:
    """Names of the runtimes that can run on this machine, in the order of registration."""
    return [name for name, entry in _RUNTIMES.items() if entry.refusal() is None]


def check(name: str) -> Runtime:
    """The runtime of that name, before long work; LeanError if there is none or it cannot run here."""
    if name not in _RUNTIMES:
        raise LeanError(f"there is no runtime {name!r}; choose one of {', '.join(_RUNTIMES)}.")
    sentence = _RUNTIMES[name].refusal()
    if sentence is not None:
        raise LeanError(sentence)
    return _RUNTIMES[name]


def prepare(model: Any, task: Runnable, runtime: str = "torch") -> Prepared:
    """Make `model` ready to answer `task` in the named runtime.

    The model is put into evaluation mode and is not otherwise changed. LeanError names a runtime that is
    unknown or that cannot run here.
    """
    return check(runtime).build(model, task)
