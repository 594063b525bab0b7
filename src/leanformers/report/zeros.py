"""What a report says in words of weights that are zero: numbers alone would let one hope."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def masking(steps: Iterable[Mapping[str, Any]]) -> list[str]:
    """The methods of a recipe that leave masks: weights that are zero and stored all the same."""
    from leanformers.methods import methods
    from leanformers.surgery import MaskWeights

    known = methods()
    found = [str(step.get("method")) for step in steps]
    return sorted({slug for slug in found if slug in known and MaskWeights.type in known[slug].edits})


def zeros(steps: Iterable[Mapping[str, Any]]) -> str:
    """The sentence for a recipe that leaves masks, "" for others."""
    found = masking(steps)
    if not found:
        return ""
    who = found[0] if len(found) == 1 else ", ".join(found[:-1]) + " and " + found[-1]
    return (
        f"The weights that {who} set to zero save no bytes and no time: they are stored and multiplied like all "
        "others, until a format or a kernel uses the zeros."
    )
