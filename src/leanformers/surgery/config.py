"""Config fields under the edits.

transformers builds the skeleton of a model from its config, and the ledger is replayed on that skeleton. So
the ledger remembers what the fields were before the first edit touched them (``skeleton``), while the config
itself always tells the truth about the model as it is.
"""

from __future__ import annotations

import copy
from typing import Any


class ConfigView:
    """A config with a few fields of its own; every other is the shared config's, at each look."""

    def __init__(self, config: Any, overrides: dict[str, Any]) -> None:
        self.__dict__["_config"] = config
        self.__dict__["_overrides"] = overrides

    @classmethod
    def over(cls, config: Any, **overrides: Any) -> ConfigView:
        if isinstance(config, cls):
            return cls(config._config, {**config._overrides, **overrides})
        return cls(config, overrides)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        overrides = self.__dict__["_overrides"]
        return overrides[name] if name in overrides else getattr(self.__dict__["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_config"], name, value)


def set_field(model: Any, config: Any, field: str, value: Any) -> None:
    """Set a config field; if it is the model's own config, remember what it was for the skeleton."""
    from leanformers.surgery.lean_config import ensure_ledger

    if config is model.config:
        record = ensure_ledger(model)
        record.skeleton.setdefault(field, copy.deepcopy(getattr(config, field)))
    setattr(config, field, value)


def restore(config: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Set ``fields`` on a config and return what they were."""
    before = {name: copy.deepcopy(getattr(config, name, None)) for name in fields}
    for name, value in fields.items():
        setattr(config, name, copy.deepcopy(value))
    return before
