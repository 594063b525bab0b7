"""Drop layers: keep some of a trained model's layers, in order, as the start of a shallower student.

Source: DistilBERT (Sanh et al., 2019, arXiv 1910.01108), which takes every other layer of the teacher;
Sajjad et al. (2023, arXiv 2004.03844) compare which to take. The kept layers' weights are untouched, so the
result is a stock checkpoint. Quality comes back by distillation, which follows as a step of its own.
Cost: all of a dropped layer's parameters and FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from leanformers.errors import LeanError
from leanformers.methods.base import Choice, Range, Saving, Subject, method, setting
from leanformers.surgery import DropLayers


@method("drop-layers", stage="structure", order=0, paper="Sanh et al. (2019); Sajjad et al. (2023)")
@dataclass(frozen=True, kw_only=True)
class DropLayersMethod:
    """Keep some layers, drop the others.

    ``spaced`` keeps the first and the last and spreads the rest evenly; ``first`` keeps the lowest.
    """

    keep: float = setting(0.5, low=0.01, high=1.0, help="share of the layers that stays")
    choose: Literal["spaced", "first"] = setting("spaced", help="which layers stay")
    layers: tuple[int, ...] | None = setting(None, help="the kept layers by index, instead of keep and choose")
    stack: str = setting("", help="encoder or decoder, where a model has both")

    def __call__(self, subject: Subject) -> None:
        subject.apply(self._edit(subject.anatomy))

    def _edit(self, anatomy: Any) -> DropLayers:
        stack = self.stack or next(iter(anatomy.stacks))
        if stack not in anatomy.stacks or (not self.stack and len(anatomy.stacks) > 1):
            raise LeanError(f"method 'drop-layers': say stack, one of {', '.join(sorted(anatomy.stacks))}.")
        count = len(anatomy.stacks[stack])
        if self.layers is not None:
            return DropLayers(keep=self.layers, stack=stack)
        size = max(1, round(self.keep * count))
        if self.choose == "first" or size == 1:
            return DropLayers(keep=tuple(range(size)), stack=stack)
        step = (count - 1) / (size - 1)
        return DropLayers(keep=tuple(round(index * step) for index in range(size)), stack=stack)

    def refuses(self, anatomy: Any, task: Any) -> str | None:
        try:
            self._edit(anatomy).cost(anatomy)
        except LeanError as error:
            return str(error).removeprefix("method 'drop-layers': ").rstrip(".")
        return self._cannot_generate(anatomy)

    def _cannot_generate(self, anatomy: Any) -> str | None:
        """T5's config calls the encoder's layers num_layers, and transformers sizes generate's cache by that."""
        needed = getattr(anatomy.model.config, "num_decoder_layers", None)
        edit = self._edit(anatomy)
        if needed is None or edit.stack != "encoder" or "decoder" not in anatomy.stacks:
            return None
        if len(edit.keep) >= needed:
            return None
        return (
            f"{len(edit.keep)} encoder layers under {needed} decoder layers: transformers cannot generate with such "
            f"a {anatomy.model.config.model_type}; keep {needed} encoder layers, or drop decoder layers first"
        )

    def estimate(self, anatomy: Any, length: int = 128) -> Saving:
        cost = self._edit(anatomy).cost(anatomy)
        return Saving(parameters=cost.parameters, flops=cost.flops(length))

    @classmethod
    def space(cls) -> dict[str, Choice | Range]:
        return {"keep": Choice((0.34, 0.5, 0.67, 0.84))}

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return [{"keep": 0.5}, {"keep": 0.67}]
