"""Which methods suit a model, and what each is estimated to save, without running any.

An estimate comes from sizes alone, at the settings that the method would try first. It says nothing of
quality, and of speed only what fewer FLOPs suggest: `leanformers slim` measures both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from leanformers.errors import LeanError
from leanformers.methods import MethodInfo, Saving, Subject, methods


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What one method could do for a model.

    settings: those that the figures are for. parameters, bytes, flops: of the model after it, estimated, None
    where the method does not say; ratios: the same to the model as it is. reason: why it does not suit.
    """

    method: str
    title: str
    stage: str
    suits: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    bytes: int | None = None
    flops: int | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    reason: str | None = None


def advise(
    model: Any, task: Any = None, *, length: int = 128, tokenizer: Any = None, trust_remote_code: bool = False
) -> list[Advice]:
    """Advice on every method, those that suit first, in the order in which a recipe would use them.

    Args:
        model: a loaded model, (model, tokenizer), a folder or a name; of the latter two the structure alone is read,
            so that a model larger than the memory can be advised on.
        task: a Task or what `leanformers.tasks.task` takes; without it methods are judged by the model alone.
        length: tokens of the sequence whose FLOPs are counted.

    Raises:
        LeanError: no such model or task, or a family that anatomy does not know.
    """
    from leanformers.anatomy import Anatomy
    from leanformers.execute import load_model, task_of
    from leanformers.measure import bytes_of_state

    the_task = task_of(task)
    loaded, tokenizer = load_model(model, the_task, tokenizer, trust_remote_code=trust_remote_code, weights=False)
    anatomy = Anatomy.of(loaded)
    now = {
        "parameters": anatomy.parameters(),
        "bytes": bytes_of_state(loaded),
        "flops": _flops(anatomy, length),
    }
    # A recipe makes its own teacher, and a missing task or tokenizer is said as a need, not as a refusal.
    subject = Subject(model=loaded, tokenizer=tokenizer, task=the_task, teacher=loaded)
    found = [_advice(info, subject, anatomy, now, length) for info in methods().values()]
    return sorted(found, key=lambda advice: not advice.suits)


def _advice(info: MethodInfo, subject: Subject, anatomy: Any, now: Mapping[str, int | None], length: int) -> Advice:
    settings = next(iter(info.starts()), {})
    facts: dict[str, Any] = {
        "method": info.slug,
        "title": info.title,
        "stage": info.stage,
        "needs": info.needs,
    }
    reason = info.unsuitable(anatomy, subject.task, settings)
    if reason is None and subject.task is not None:
        reason = info.missing(subject)
    if reason is not None:
        return Advice(**facts, suits=False, settings=settings, reason=reason)
    method = info.build(settings)
    try:
        saving = method.estimate(anatomy, length) if hasattr(method, "estimate") else None
    except LeanError as error:  # settings that this model needs to be told
        return Advice(**facts, suits=False, settings=settings, reason=str(error))
    if not isinstance(saving, Saving):
        return Advice(**facts, suits=True, settings=settings)
    after = _after(saving, now)
    ratios = {name: value / before for name, value in after.items() if (before := now[name])}
    return Advice(**facts, suits=True, settings=settings, ratios=ratios, **after)


def _after(saving: Saving, now: Mapping[str, int | None]) -> dict[str, Any]:
    """Totals after the method, of what is known."""
    parameters, size = now["parameters"] or 0, now["bytes"] or 0
    per_weight = size / parameters if parameters else 0.0
    saved = round(saving.parameters * per_weight) if saving.bytes is None else saving.bytes
    after = {"parameters": parameters + saving.parameters, "bytes": size + saved}
    if now["flops"] is not None:
        after["flops"] = now["flops"] + saving.flops
    return after


def _flops(anatomy: Any, length: int) -> int | None:
    """FLOPs of one sequence; None for a model that anatomy cannot count (not of text)."""
    try:
        return anatomy.flops(length)
    except (ValueError, AttributeError, NotImplementedError):
        return None
