"""Settings of a method: declared as dataclass fields, read for help texts, checked against type and range."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from leanformers.errors import LeanError


@dataclass(frozen=True)
class Choice:
    """A search may take one of these values."""

    values: Sequence[Any]


@dataclass(frozen=True)
class Range:
    """A search may take any number from low to high, both included; whole numbers if both are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a method, for help texts and checks."""

    name: str
    type: Any
    default: Any
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] | None = None
    help: str = ""

    @property
    def type_name(self) -> str:
        return _type_name(self.type)


def setting(
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[Any] | None = None,
    help: str = "",
) -> Any:
    """A dataclass field with bounds (both included), allowed values and a line of help."""
    bounds = {"low": low, "high": high, "choices": None if choices is None else tuple(choices), "help": help}
    return dataclasses.field(default=default, metadata=bounds)


def read_settings(cls: type) -> tuple[Setting, ...]:
    """The settings of a method's dataclass, in order."""
    hints = typing.get_type_hints(cls)
    settings = []
    for entry in dataclasses.fields(cls):
        default = entry.default
        if default is dataclasses.MISSING and entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        metadata = {key: entry.metadata.get(key) for key in ("low", "high", "choices")}
        kind = hints[entry.name]
        if metadata["choices"] is None and typing.get_origin(kind) is typing.Literal:
            metadata["choices"] = typing.get_args(kind)
        help_ = entry.metadata.get("help", "")
        settings.append(Setting(name=entry.name, type=kind, default=default, help=help_, **metadata))
    return tuple(settings)


def check_settings(slug: str, cls: type, values: Mapping[str, Any]) -> Any:
    """Build the method from settings as YAML or JSON give them.

    Lists become tuples and whole numbers become floats where the type says so.
    Raises LeanError in one sentence that names the method, the setting and what is allowed.
    """
    known = {entry.name: entry for entry in read_settings(cls)}
    checked = {}
    for name, value in values.items():
        if name not in known:
            close = get_close_matches(str(name), known, n=1, cutoff=0.5)
            guess = f" (did you mean '{close[0]}'?)" if close else ""
            listed = ", ".join(known) if known else "none"
            raise LeanError(f"method '{slug}' has no setting '{name}'{guess}; its settings are: {listed}")
        checked[name] = _check(slug, known[name], value)
    for name, entry in known.items():
        if entry.default is dataclasses.MISSING and name not in checked:
            raise LeanError(f"method '{slug}' needs a value for its setting '{name}' ({entry.type_name})")
    try:
        return cls(**checked)
    except (ValueError, TypeError) as error:  # __post_init__ of the method; LeanError is a ValueError
        raise LeanError(f"method '{slug}': {error}") from error


def _check(slug: str, entry: Setting, value: Any) -> Any:
    try:
        value = _convert(entry.type, value)
    except (TypeError, ValueError):
        wanted = _allowed(entry) or entry.type_name
        raise LeanError(f"method '{slug}': setting '{entry.name}' must be {wanted}, not {value!r}") from None
    outside = isinstance(value, int | float) and (
        (entry.low is not None and value < entry.low) or (entry.high is not None and value > entry.high)
    )
    if outside or (entry.choices is not None and value not in entry.choices):
        raise LeanError(f"method '{slug}': setting '{entry.name}' must be {_allowed(entry)}, not {value!r}")
    return value


def _allowed(entry: Setting) -> str:
    if entry.choices is not None:
        return "one of " + ", ".join(map(repr, entry.choices))
    if entry.low is not None and entry.high is not None:
        return f"{entry.type_name} from {entry.low} to {entry.high}"
    if entry.low is not None:
        return f"{entry.type_name} of at least {entry.low}"
    return f"{entry.type_name} of at most {entry.high}" if entry.high is not None else ""


def _convert(kind: Any, value: Any) -> Any:
    """The value as `kind`, or TypeError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if kind is None or kind is type(None):
        return _only(value is None, value)
    if origin in (typing.Union, types.UnionType):
        for one in args:
            try:
                return _convert(one, value)
            except TypeError:
                continue
        raise TypeError
    if origin is typing.Literal:
        return _only(value in args, value)
    if origin in (tuple, list) or (origin is not None and origin is Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError
        if origin is tuple and not (len(args) == 2 and args[1] is ...):
            _only(len(args) == len(value), value)
            return tuple(_convert(one, item) for one, item in zip(args, value, strict=True))
        return tuple(_convert(args[0], item) for item in value)
    if origin in (dict, Mapping):
        _only(isinstance(value, Mapping), value)
        return {_convert(args[0], key): _convert(args[1], item) for key, item in value.items()}
    if kind is float:
        _only(isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value), value)
        return float(value)
    if kind is int:
        return _only(isinstance(value, int) and not isinstance(value, bool), value)
    return _only(isinstance(value, kind), value)


def _only(right: bool, value: Any) -> Any:
    if not right:
        raise TypeError
    return value


_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def _type_name(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in _WORDS:
        return _WORDS[kind]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type_name, args))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (tuple, list):
        return "a list of " + {int: "whole numbers", float: "numbers", str: "texts"}.get(args[0], "values")
    return getattr(kind, "__name__", str(kind))
