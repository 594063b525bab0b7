"""What a method is: settings, what it needs and suits, its search space, and the subject it works on.

A method is a frozen dataclass of settings with the paper's defaults. Calling it on a `Subject` performs
edits and training; it holds no save code, no training loop and no module surgery of its own::

    @method("greenformers", stage="structure", paper="Cahyawijaya (2021)", suits={"kinds": ("causal-lm",)})
    @dataclass(frozen=True, kw_only=True)
    class Greenformers:
        rank: float = setting(0.5, low=0.01, high=1.0, help="kept share of the full rank")

        def __call__(self, subject: Subject) -> None: ...

        @classmethod
        def space(cls) -> dict[str, Choice | Range]:              # optional: what a search may try
            return {"rank": Range(0.1, 0.7)}

        @classmethod
        def starts(cls) -> list[dict[str, Any]]:                  # optional: what to try first; []: none
            return [{"rank": 0.5}]

        def refuses(self, anatomy, task) -> str | None: ...       # optional: why these settings do not suit
        def estimate(self, anatomy, length=128) -> Saving: ...    # optional: what it saves, not running it
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from leanformers.errors import LeanError
from leanformers.methods.settings import Choice, Range, Setting, check_settings, read_settings, setting
from leanformers.methods.subject import Budget, Subject

__all__ = [
    "NEEDS",
    "STAGES",
    "Budget",
    "Choice",
    "Method",
    "MethodInfo",
    "Range",
    "Saving",
    "Setting",
    "Subject",
    "method",
    "setting",
]

STAGES = ("prepare", "vocabulary", "structure", "recover", "quantise")
"""The order in which a search puts methods: a model of the task (what baseline and teacher are), smaller
tables, smaller layers, regained quality, fewer bits."""

NEEDS = {
    "calibration": "texts to calibrate on",
    "text": "training texts",
    "labels": "labelled training data",
    "teacher": "a teacher",
    "tokenizer": "the model's tokenizer",
    "gpu": "a GPU",
    "torchao": "the package torchao",
}


class Method(Protocol):
    """What `@method` accepts: called on a subject, it edits and trains the subject's model."""

    def __call__(self, subject: Subject) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What a method is estimated to change, without running it: deltas, so savings are negative.

    parameters: count. bytes: of the saved weights; None means parameters times the model's bytes per weight.
    flops: of one forward pass at the length that was asked for.
    """

    parameters: int = 0
    bytes: int | None = None
    flops: int = 0


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """A registered method: its class and what it declares."""

    slug: str
    cls: type
    title: str
    paper: str
    stage: str
    order: int
    trains: bool
    needs: tuple[str, ...]
    suits: Mapping[str, Any]
    doc: str
    stock: bool = True

    @property
    def settings(self) -> tuple[Setting, ...]:
        return read_settings(self.cls)

    @property
    def edits(self) -> tuple[str, ...]:
        """Types of the edits that its file names, or the files that it shares with other methods: it may make those."""
        from leanformers.surgery import Edit

        own = vars(sys.modules[self.cls.__module__]).values()
        files = {str(getattr(value, "__module__", "")) for value in own}
        shared = [vars(sys.modules[name]).values() for name in files if name.startswith("leanformers.methods.")]
        named = [value for values in (own, *shared) for value in values if isinstance(value, type)]
        return tuple(sorted({v.type for v in named if issubclass(v, Edit) and v is not Edit}))

    def build(self, settings: Mapping[str, Any] | None = None) -> Any:
        """The method with these settings; LeanError names an unknown setting or a wrong value."""
        return check_settings(self.slug, self.cls, settings or {})

    def space(self) -> dict[str, Choice | Range]:
        """What a search may try, by setting; empty if the method declares nothing."""
        declared = getattr(self.cls, "space", None)
        return dict(declared()) if declared else {}

    def starts(self) -> list[dict[str, Any]]:
        """Settings worth trying first; the paper's defaults if the method declares nothing."""
        declared = getattr(self.cls, "starts", None)
        return [dict(settings) for settings in declared()] if declared else [{}]

    def unsuitable(
        self, anatomy: Any = None, task: Any = None, settings: Mapping[str, Any] | None = None
    ) -> str | None:
        """Why the method does not suit this model or task, in one sentence; None if it does."""
        kinds, families = self.suits.get("kinds"), self.suits.get("families")
        name = f"method '{self.slug}'"
        if kinds and task is not None and task.kind not in kinds:
            return f"{name} does not suit {task.kind} tasks; it suits {', '.join(kinds)}"
        if families and anatomy is not None and anatomy.family.name not in families:
            return f"{name} does not suit the family {anatomy.family.name}; it suits {', '.join(families)}"
        if anatomy is not None and self.stage == "structure" and (shared := _shared_block(anatomy)):
            return f"{name} does not suit this model: {shared}"
        if anatomy is not None and hasattr(self.cls, "refuses"):
            reason = self.build(settings).refuses(anatomy, task)
            return f"{name} does not suit this model: {reason}" if reason else None
        return None

    def missing(self, subject: Subject) -> str | None:
        """Which need the subject does not meet, in one sentence; None if all are met."""
        for need in self.needs:
            if not _meets(need, subject):
                return f"method '{self.slug}' needs {NEEDS[need]}; {_REMEDIES[need]}"
        return None

    def check(self, subject: Subject, settings: Mapping[str, Any] | None = None) -> None:
        """Refuse before any work what cannot run."""
        reason = self.missing(subject)
        if reason is None:
            suited = self.suits.get("families") or hasattr(self.cls, "refuses") or self.edits
            reason = self.unsuitable(subject.anatomy if suited else None, subject.task, settings)
        if reason is not None:
            raise LeanError(reason)


_REMEDIES = {
    "calibration": "give a task, e.g. task='sentiment' or --data FILE",
    "text": "give a task, e.g. task='sentiment' or --data FILE",
    "labels": "give a task whose rows have a label or a target",
    "teacher": "run it in a recipe with a task: the model as given is then the teacher",
    "tokenizer": "load the model from a folder or a name, or pass tokenizer=…",
    "gpu": "run it on a machine with CUDA",
    "torchao": "pip install 'leanformers[quant]'",
}


def _meets(need: str, subject: Subject) -> bool:
    if need in ("calibration", "text"):
        return subject.task is not None
    if need == "labels":
        return subject.task is not None and has_labels(subject.task)
    if need == "gpu":
        import torch

        return torch.cuda.is_available()
    if need == "torchao":
        return importlib.util.find_spec(need) is not None
    return getattr(subject, need) is not None


def _shared_block(anatomy: Any) -> str | None:
    """Which block has weights of an earlier one; None where all have their own."""
    owners: dict[int, str] = {}
    for layer in anatomy.layers:
        for parameter in layer.module.parameters():
            if (owner := owners.setdefault(id(parameter), layer.path)) != layer.path:
                return f"{layer.path} shares weights with {owner}; give each block its own (copy.deepcopy)"
    return None


def has_labels(task: Any) -> bool:
    """Whether the task has a loss of its own: labels, targets, or the text itself for language models."""
    return not getattr(task, "needs_teacher", False)


_registry: dict[str, MethodInfo] = {}
_Class = TypeVar("_Class", bound=type)


def method(
    slug: str,
    *,
    stage: str = "structure",
    order: int = 0,
    trains: bool = False,
    needs: Sequence[str] = (),
    suits: Mapping[str, Any] | None = None,
    paper: str = "",
    title: str = "",
    stock: bool = True,
) -> Callable[[_Class], _Class]:
    """Register a frozen dataclass of settings as a method.

    stage: one of STAGES; order: place within the stage, low first. trains: whether it calls `subject.train`.
    needs: of NEEDS, checked before any work. suits: {"kinds": task kinds, "families": model types}, an absent
    key meaning all. title: a few words, by default the first line of the docstring. stock: whether a stock model
    stays one, which transformers loads alone.
    """
    if stage not in STAGES:
        raise ValueError(f"@method({slug!r}): stage {stage!r} is not one of {', '.join(STAGES)}")
    if unknown := [need for need in needs if need not in NEEDS]:
        raise ValueError(f"@method({slug!r}): needs {unknown} are not of {', '.join(NEEDS)}")

    def register(cls: _Class) -> _Class:
        params = getattr(cls, "__dataclass_params__", None)
        if params is None or not params.frozen:
            raise TypeError(f"@method({slug!r}) wants a frozen dataclass below it")
        doc = cls.__doc__ or ""
        if doc.startswith(f"{cls.__name__}("):  # dataclass writes the signature where there is no docstring
            doc = ""
        info = MethodInfo(
            slug=slug,
            cls=cls,
            title=title or doc.strip().split("\n")[0].rstrip(".") or slug,
            paper=paper,
            stage=stage,
            order=order,
            trains=trains,
            needs=tuple(needs),
            suits=dict(suits or {}),
            doc=doc,
            stock=stock,
        )
        _registry[slug] = info
        cls.slug, cls.info = slug, info  # type: ignore[attr-defined]
        return cls

    return register
