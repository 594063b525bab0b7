"""Reduce tokens: some layers drop a part of their tokens for good, so that all later ones see fewer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from leanformers.anatomy import Anatomy
from leanformers.anatomy.flops import layer_flops
from leanformers.errors import LeanError
from leanformers.parts import token_reducers as reducers
from leanformers.parts.attention import put_mixer, switch_on
from leanformers.parts.token_rules import make_rule
from leanformers.surgery.edit import Cost, Edit, edit


@dataclass(frozen=True)
class Shorter(Cost):
    """A change of FLOPs that is no polynomial of the length, since what stays is rounded."""

    change: Callable[[int], int] = lambda length: 0

    def flops(self, length: int) -> int:
        return self.change(length)


@edit("reduce_tokens")
@dataclass(frozen=True, kw_only=True)
class ReduceTokens(Edit):
    """Drop tokens in ``layers`` (ascending indices), by a rule of ``parts.token_rules`` with its settings (plain JSON;
    lists run parallel to ``layers``), ``after_layer`` or ``before_feed_forward``.

    For encoders that are read out at their first tokens, which always stay, or over all that are left (DINOv2's mean of
    patches is then of the patches that stay). What stays keeps its order. Padded texts keep the counts that they have
    alone. Once per model. Costs of edits that come after it are counted as if no token were dropped.
    """

    layers: tuple[int, ...]
    rule: str
    where: str = "after_layer"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "settings", json.loads(json.dumps(self.settings)))

    def _reduction(self, anatomy: Anatomy) -> reducers.Reduction:
        if (reason := refusal(anatomy)) is not None:
            raise LeanError(reason)
        ascending = all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False))
        count = anatomy.num_hidden_layers
        if not self.layers or not ascending or self.layers[0] < 0 or self.layers[-1] >= count:
            raise LeanError(f"layers={list(self.layers)}: give ascending indices below {count}, at least one.")
        if self.where not in reducers.PLACES:
            raise LeanError(f"Tokens can be dropped {' or '.join(reducers.PLACES)}, not {self.where!r}.")
        for index in self.layers:
            attention = anatomy.layers[index].attention
            if attention.absent:
                raise LeanError(f"The attention at {attention.path!r} was dropped and scores none: leave it out.")
            if attention.mixer is not None:
                raise LeanError(f"The attention at {attention.path!r} holds a mixer already: leave it out.")
        rule = make_rule(self.rule, len(self.layers), anatomy.family.summary_tokens, self.settings)
        return reducers.Reduction(rule, self.where, self.layers)

    def apply(self, anatomy: Anatomy, **tensors: object) -> None:
        shared = self._reduction(anatomy)
        for layer in anatomy.layers:
            number = sum(index < layer.index for index in self.layers)
            place = reducers.Place(shared, number)
            reducers.mark(layer.attention.module, place)
            if layer.index not in self.layers:
                continue
            put_mixer(layer.attention.module, reducers.TokenReducer(place).train(layer.module.training))
            post = layer.norm("post", "attention")
            if self.where == "before_feed_forward" and post is not None:
                _hook(post.module, place, after=reducers.gather_output)
                continue
            if self.where == "before_feed_forward":
                part = anatomy.module(layer.feed_forward.path)
                _hook(part, place, before=reducers.gather_input, after=reducers.spread_output)
            _hook(layer.module, place, after=reducers.gather_output)
        model: Any = anatomy.model
        reducers.mark(model, reducers.Place(shared, 0))
        model.register_forward_pre_hook(reducers.begin_call, with_kwargs=True)
        model.register_forward_hook(reducers.end_call, always_call=True)
        switch_on(model)

    def cost(self, anatomy: Anatomy) -> Cost:
        shared = self._reduction(anatomy)
        places = [reducers.Place(shared, number) for number in range(len(self.layers))]
        made = {index: reducers.TokenReducer(place) for index, place in zip(self.layers, places, strict=True)}
        return Shorter(change=partial(_change, anatomy, made))


def _change(anatomy: Anatomy, made: dict[int, reducers.TokenReducer], length: int) -> int:
    return layer_flops(anatomy, length, reducers=made) - layer_flops(anatomy, length, reducers={})


def _hook(module: Any, place: reducers.Place, *, after: Any, before: Any = None) -> None:
    reducers.mark(module, place)
    if before is not None:
        module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def refusal(anatomy: Anatomy) -> str | None:
    """Why a model cannot do with fewer tokens in its later layers, in one sentence; None where it can."""
    name = type(anatomy.model).__name__
    if anatomy.causal or len(anatomy.stacks) > 1 or "decoder" in anatomy.stacks:
        return f"{name} decodes, and a dropped token's answer would be missing: reduce the tokens of an encoder."
    if not anatomy.reads_one_vector:
        return f"{name} answers for every token, and those that are dropped would have no answer: leave them all."
    if (more := anatomy.more_than_softmax("mixer")) is not None:  # whose layers it leaves alone
        return f"{name} {more}, which would have to follow the tokens that stay."
    if not anatomy.family.summary_tokens:
        return f"{name} has no token of its own that stands for the whole input, so all its tokens are needed."
    if not anatomy.swappable_attention:
        return f"{name} does not hand its attention to transformers' attention interface, so no mixer takes its place."
    if anatomy.reduces_tokens:
        return f"{name} drops tokens already: reduce them once, with one schedule."
    return None


def set_default(model: Any, **settings: Any) -> None:
    """Change settings of the rule, in the model and in the ledger that it is saved with; weights stay.

    Raises:
        LeanError: no tokens are dropped, or the rule does not take them.
    """
    shared = reducers.reduction(model)
    from leanformers.surgery.lean_config import ledger_of

    record = ledger_of(model.config)
    entry = next((one for one in record.edits if one["type"] == ReduceTokens.type), None) if record else None
    if shared is None or entry is None:
        raise LeanError(f"{type(model).__name__} drops no tokens: make the edit reduce_tokens first.")
    changed = json.loads(json.dumps({**entry["settings"], **settings}))
    shared.rule = make_rule(entry["rule"], len(shared.layers), shared.rule.specials, changed)
    entry["settings"] = changed
