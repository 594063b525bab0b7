"""What an edit is: a small frozen record that says what changes, and how to change it.

An edit has three duties. It serialises to a small JSON object with its type and version; ``apply`` changes a
model, whether it has weights or is a skeleton on the meta device (then the shapes alone); ``cost`` says,
before, what that does to parameters and FLOPs. Tensors that decide an edit (kept indices, factors, a mask)
are arguments of ``apply`` and live on in the tensors that the edit leaves behind, never in the JSON.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError


@dataclass(frozen=True)
class Cost:
    """What an edit changes: parameters, and FLOPs (multiply-add = 2) of one sequence.

    ``per_token`` counts per token, ``per_pair`` per query-key pair, ``per_sequence`` once.
    """

    parameters: int = 0
    per_token: int = 0
    per_pair: int = 0
    per_sequence: int = 0

    def flops(self, length: int) -> int:
        """The change of FLOPs for one sequence of ``length`` tokens."""
        return self.per_sequence + length * self.per_token + length * length * self.per_pair

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Base of all edits."""

    type: ClassVar[str]
    version: ClassVar[int] = 1
    lost_by_export: ClassVar[str | None] = None  # what an exported model no longer does, in one sentence

    def apply(self, anatomy: Anatomy, **tensors: Any) -> None:
        """Change the model that ``anatomy`` maps, in place."""
        raise NotImplementedError

    def cost(self, anatomy: Anatomy) -> Cost:
        """What ``apply`` will change, from the sizes alone."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        settings = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        return {"type": self.type, "version": self.version, **settings}


_REGISTRY: dict[str, type[Edit]] = {}
E = TypeVar("E", bound=type[Edit])


def edit(name: str, version: int = 1) -> Callable[[E], E]:
    """Register an edit class under the name that its JSON carries."""

    def register(cls: E) -> E:
        cls.type, cls.version = name, version
        _REGISTRY[name] = cls
        return cls

    return register


def from_json(record: Any) -> Edit:
    """The edit that a ledger's record describes.

    Raises:
        LeanError: unknown type, newer version, or settings that do not fit.
    """
    if not isinstance(record, dict) or "type" not in record:
        raise LeanError(f"The ledger holds {record!r}, which is no edit: the checkpoint's config.json was altered.")
    settings = dict(record)
    name, version = settings.pop("type"), settings.pop("version", 1)
    cls = _REGISTRY.get(name)
    if cls is None or version > cls.version:
        raise LeanError(
            f"The ledger holds the edit {name!r} in version {version}, which this leanformers does not know: "
            "upgrade leanformers."
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(settings) - set(fields)):
        raise LeanError(f"The edit {name!r} in the ledger has unknown settings {unknown}: config.json was altered.")
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    try:
        return cls(**settings)
    except TypeError as error:
        raise LeanError(
            f"The edit {name!r} in the ledger lacks a setting ({error}): config.json was altered."
        ) from None


def edit_types() -> Iterator[str]:
    """The vocabulary: the names of all edits."""
    yield from sorted(_REGISTRY)


def exportable_types() -> Iterator[str]:
    """Of them, those that an exported model goes on doing."""
    yield from (name for name in edit_types() if _REGISTRY[name].lost_by_export is None)


def lost_by_export(types: Iterable[str]) -> str | None:
    """What an exported model with edits of these types no longer does, in one sentence; None if it does all."""
    return next((told for name in types if (told := _REGISTRY[name].lost_by_export) is not None), None)


# -- helpers that edits share ----------------------------------------------------------------------------------


def kept(keep: torch.Tensor | None, size: int, total: int, what: str, *, on_skeleton: bool) -> torch.Tensor:
    """Checked indices [size], int64, ascending.

    A skeleton has no weights to choose from, so any ``size`` rows give its shape.

    Raises:
        LeanError: size out of range, indices missing, not ascending, or out of range.
    """
    if not 0 < size <= total:
        raise LeanError(f"Cannot keep {size} of {total} {what}: keep between 1 and {total}.")
    if keep is None:
        if not on_skeleton and size != total:
            raise LeanError(f"Which {size} of {total} {what} to keep is not said: pass keep=, a tensor of indices.")
        return torch.arange(size)
    keep = torch.as_tensor(keep, dtype=torch.int64).cpu()
    if keep.ndim != 1 or len(keep) != size:
        raise LeanError(f"keep has shape {list(keep.shape)}, but {size} {what} are to be kept: pass {size} indices.")
    if len(keep) and (keep[0] < 0 or keep[-1] >= total or (keep.diff() <= 0).any()):
        raise LeanError(f"keep must hold ascending, distinct indices below {total}, the number of {what}.")
    return keep


def replace(anatomy: Anatomy, path: str, module: nn.Module) -> None:
    """Put ``module`` where ``path`` (relative to the base model) points."""
    parent, _, name = path.rpartition(".")
    setattr(anatomy.module(parent) if parent else anatomy.base, name, module)


def on_meta(module: nn.Module) -> bool:
    """Whether the module is a skeleton without weights."""
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    return tensor is not None and tensor.device.type == "meta"
