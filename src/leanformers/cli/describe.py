"""`leanformers methods [NAME]`: what there is, what it needs and suits, its settings, its evidence."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

from rich.padding import Padding
from rich.text import Text

from leanformers import evidence
from leanformers.cli.console import out
from leanformers.cli.tables import by_stage, rows

STAGE_TITLES = {
    "prepare": "make it fit for the task",
    "vocabulary": "fewer words",
    "structure": "smaller layers",
    "recover": "quality regained",
    "quantise": "at last, how it is stored and run",
}


def show_methods() -> None:
    """All methods, by stage."""
    from leanformers.methods import methods

    results = evidence.results()
    stages: dict[str, list[tuple[str, str, str, str]]] = {}
    for slug, info in methods().items():
        more = f"needs {needs(info)}; suits {suits(info)}"
        held = evidence.verdict(results[slug]) if slug in results else "–"
        stages.setdefault(STAGE_TITLES.get(info.stage, info.stage), []).append((slug, info.title, more, held))
    out().print(by_stage(stages))
    out().print("leanformers methods NAME says more of one.", style="dim")


def show_method(name: str) -> None:
    """One method in full."""
    from leanformers.methods import get

    info, console = get(name), out()
    console.print(Text.assemble((info.slug, "bold"), "  ", info.title))
    if info.paper:
        console.print(info.paper, style="dim", markup=False)
    for text in (documentation(info), own_doc(info)):
        if text:
            console.print(Padding(Text(reflowed(text)), (1, 0, 0, 0)))
    console.print()
    stage = STAGE_TITLES.get(info.stage, info.stage)
    facts = [("stage", stage), ("needs", needs(info)), ("suits", suits(info)), ("runs in", runs_in(info))]
    for title, text in facts:
        console.print(Text.assemble((f"{title}  ", "dim"), text))
    console.print()
    settings = settings_rows(info)
    if settings:
        console.print(rows(("setting", "type", "default", "search", ""), settings))
    else:
        console.print("It has no settings.")
    result = evidence.results().get(name)
    if result is None:
        console.print("No evidence has been recorded for it yet.", style="dim")
        return
    console.print(Text.assemble(("evidence: ", "bold"), result["claim"], f" ({evidence.verdict(result)})"))
    lines = [
        [
            check["name"],
            str(check["required"]),
            evidence.number(check["measured"]),
            "yes" if check["holds"] else "no",
        ]
        for check in result["checks"]
    ]
    console.print(rows(("check", "required", "measured", "holds"), lines))


def reflowed(text: str) -> str:
    """Paragraphs without their line breaks; lines that are indented or listed stay as they are."""
    kept: list[str] = []
    for line in text.replace("``", "").splitlines():
        starts = not line or line[0] in " -*" or not kept or not kept[-1] or kept[-1][0] in " -*"
        if starts:
            kept.append(line)
        else:
            kept[-1] += " " + line
    return "\n".join(kept)


def needs(info: Any) -> str:
    """What the method needs, in words."""
    from leanformers.methods import NEEDS

    return ", ".join(NEEDS.get(need, need) for need in info.needs) or "nothing"


def suits(info: Any) -> str:
    """Which tasks, and of which families models, the method suits, in words."""
    tasks = ", ".join(info.suits.get("kinds", ())) or "every task"
    families = ", ".join(info.suits.get("families", ()))
    return f"{tasks}; {families}" if families else tasks


def runs_in(info: Any) -> str:
    """Where models with the method's edits answer as they do in PyTorch, in words."""
    if not info.edits:
        return "whatever runs the model: it makes no edits of its own"
    edits = ", ".join(info.edits).replace("_", " ")
    found = evidence.runs_in(info.edits)
    return f"torch, {found} ({edits})" if found else f"torch; others were not tried ({edits})"


def documentation(info: Any) -> str:
    """The docstring of the method's file: paper, idea, deviations, cost."""
    return inspect.cleandoc(sys.modules[info.cls.__module__].__doc__ or "")


def own_doc(info: Any) -> str:
    """The docstring of the method's class, without a first line that is its title."""
    text = inspect.cleandoc(info.doc)
    first, _, rest = text.partition("\n")
    return rest.strip() if first.rstrip(".") == info.title else text


def settings_rows(info: Any) -> list[list[str]]:
    """Name, type, default, what a search tries, and help of each setting."""
    space = info.space()
    return [
        [entry.name, allowed(entry), _shown(entry.default), searched(space.get(entry.name)), entry.help]
        for entry in info.settings
    ]


def allowed(entry: Any) -> str:
    """The type of a setting with its bounds or values."""
    if entry.choices is not None:
        return "one of " + ", ".join(map(_shown, entry.choices))
    bounds = [f"{word} {bound:g}" for word, bound in (("from", entry.low), ("to", entry.high)) if bound is not None]
    return " ".join([entry.type_name, *bounds])


def searched(space: Any) -> str:
    """What a search tries for a setting; empty if it leaves the default."""
    if space is None:
        return ""
    if hasattr(space, "values"):
        return ", ".join(map(_shown, space.values))
    scale = " (log)" if space.log else ""
    return f"{space.low:g} to {space.high:g}{scale}"


def _shown(value: Any) -> str:
    """A default or a choice as YAML would write it."""
    if value is dataclasses.MISSING:
        return "must be given"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return str(value)
