"""The space of recipes: which methods in which order, with which settings.

Order within a recipe is that of `methods.STAGES`. One method at most cuts the vocabulary, up to two change
the structure, one regains quality where the structure changed, one quantises. Optuna sees a categorical per
slot and the settings of the methods in use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from leanformers.methods import Choice, MethodInfo, get, place

NONE = "none"
Steps = list[dict[str, Any]]


class Space:
    """Recipes from the given methods.

    multiple: what widths are to be multiples of, for those methods that can round to it; 1: anything. quantised:
    whether the runtime that judges the recipes quantises models itself, so that doing it before gains little.
    """

    def __init__(self, infos: Sequence[MethodInfo], *, multiple: int = 1, quantised: bool = False) -> None:
        self.multiple, self.quantised = multiple, quantised
        self.infos = {info.slug: info for info in sorted(infos, key=place) if info.stage != "prepare"}

    def stage(self, name: str) -> list[str]:
        return [slug for slug, info in self.infos.items() if info.stage == name]

    @property
    def digest(self) -> str:
        """Hash (8 hex digits) of what can be chosen: studies of one space can go on from each other."""
        told: dict[str, Any] = {s: {n: repr(c) for n, c in i.space().items()} for s, i in self.infos.items()}
        if self.multiple > 1:
            told["multiple"] = self.multiple
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]

    # -- drawing -------------------------------------------------------------------------------------------
    def suggest(self, trial: Any) -> Steps:
        """A recipe, drawn by the study's sampler (`trial` is an optuna trial)."""
        slugs = [self._slot(trial, "vocabulary", self.stage("vocabulary"))]
        structure = self.stage("structure")
        changed = [self._slot(trial, "structure", structure)]
        if changed[0] != NONE and len(structure) > 1 and trial.suggest_int("combine", 0, 2) == 0:
            changed.append(trial.suggest_categorical("structure 2", structure))
        slugs += changed
        if changed[0] != NONE:
            slugs.append(self._slot(trial, "recover", self.stage("recover")))
        slugs.append(self._slot(trial, "quantise", self.stage("quantise")))
        used = sorted({slug for slug in slugs if slug != NONE}, key=lambda slug: place(self.infos[slug]))
        return [{"method": slug, **self._settings(trial, slug)} for slug in used]

    @staticmethod
    def _slot(trial: Any, name: str, slugs: list[str]) -> str:
        return trial.suggest_categorical(name, [NONE, *slugs]) if slugs else NONE

    def _settings(self, trial: Any, slug: str) -> dict[str, Any]:
        drawn = {}
        for name, allowed in self.infos[slug].space().items():
            label = f"{slug}.{name}"
            if isinstance(allowed, Choice):
                by_text = {_text(value): value for value in allowed.values}
                drawn[name] = by_text[trial.suggest_categorical(label, list(by_text))]
            elif _whole(allowed.low, allowed.high, allowed.step):
                step = int(allowed.step or 1)
                drawn[name] = trial.suggest_int(
                    label,
                    int(allowed.low),
                    int(allowed.high),
                    log=allowed.log,
                    step=1 if allowed.log else step,
                )
            else:
                value = trial.suggest_float(label, allowed.low, allowed.high, log=allowed.log, step=allowed.step)
                drawn[name] = float(f"{value:.3g}")  # recipes are read by people
        return {**drawn, **self._rounded(slug)}

    def _rounded(self, slug: str) -> dict[str, Any]:
        """The setting by which a method rounds the widths that it leaves, where that is asked for."""
        rounds = self.multiple > 1 and any(entry.name == "multiple" for entry in self.infos[slug].settings)
        return {"multiple": self.multiple} if rounds else {}

    # -- writing down --------------------------------------------------------------------------------------
    def params(self, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The optuna parameters that draw this recipe, as far as the space can."""
        found: dict[str, Any] = {}
        structure = []
        for step in steps:
            info = self.infos[step["method"]]
            if info.stage == "structure":
                structure.append(info.slug)
            else:
                found[info.stage] = info.slug
            space = info.space()
            for name, value in step.items():
                if name in space and _holds(space[name], value):
                    allowed = space[name]
                    found[f"{info.slug}.{name}"] = _text(value) if isinstance(allowed, Choice) else value
        for stage in ("vocabulary", "structure", "recover", "quantise"):
            if self.stage(stage):
                found.setdefault(stage, NONE)
        if structure:
            found["structure"] = structure[0]
            found["combine"] = 0 if len(structure) > 1 else 1
            if len(structure) > 1:
                found["structure 2"] = structure[1]
        return found

    def starts(self) -> list[Steps]:
        """Recipes worth trying first, made of the methods' own first settings, the most useful first.

        Each structural start with recovery, alone and with the first vocabulary and quantising ones around
        it; and those two without any change of structure. Quantising stands at the end, alone, where the runtime
        quantises.
        """
        first = {stage: self._first(stage) for stage in ("vocabulary", "recover", "quantise")}
        if self.quantised:
            first["quantise"] = []
        around = [step for stage in ("vocabulary", "quantise") for step in first[stage]]
        found: list[Steps] = [around] if around else []
        for rank in range(max((len(self._starts(slug)) for slug in self.stage("structure")), default=0)):
            for slug in self.stage("structure"):
                for step in self._starts(slug)[rank : rank + 1]:
                    found.append([step, *first["recover"]])
                    found.append([*first["vocabulary"], step, *first["recover"], *first["quantise"]])
        alone = ["quantise", "vocabulary"]
        for stage in reversed(alone) if self.quantised else alone:
            found += [[step] for slug in self.stage(stage) for step in self._starts(slug)]
        unique: list[Steps] = []
        for steps in found:
            if steps and steps not in unique:
                unique.append(steps)
        return unique

    def _starts(self, slug: str) -> Steps:
        """A method's first settings, with those that the space draws written out: equals look equal."""
        info = self.infos[slug]
        usual = {entry.name: entry.default for entry in info.settings if entry.name in info.space()}
        return [{"method": slug, **usual, **settings, **self._rounded(slug)} for settings in info.starts()]

    def _first(self, stage: str) -> Steps:
        """The first of the stage's starts, if it has any."""
        return [step for slug in self.stage(stage) for step in self._starts(slug)[:1]][:1]


def trained_prefix(infos: Mapping[str, MethodInfo], steps: Sequence[Mapping[str, Any]]) -> int:
    """How many leading steps end in the last one that trains; 0 if none does."""
    known = (infos.get(step["method"]) or get(step["method"]) for step in steps)  # a run may hold others' recipes
    return max((i + 1 for i, info in enumerate(known) if info.trains), default=0)


def name_of(steps: Sequence[Mapping[str, Any]], key: str) -> str:
    """A folder's name for a recipe: its methods and four digits of its hash."""
    return "+".join(str(step["method"]) for step in steps)[:80] + f"-{key[:4]}"


def _text(value: Any) -> Any:
    """A choice as optuna can store it."""
    plain = value is None or isinstance(value, bool | int | float | str)
    return value if plain else json.dumps(value, sort_keys=True)


def _whole(*numbers: float | None) -> bool:
    return all(number is None or isinstance(number, int) for number in numbers)


def _holds(allowed: Any, value: Any) -> bool:
    if isinstance(allowed, Choice):
        return _text(value) in [_text(one) for one in allowed.values]
    return isinstance(value, int | float) and allowed.low <= value <= allowed.high
