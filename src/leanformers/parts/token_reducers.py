"""Token reduction: in some layers a part of the tokens is dropped for good, and all later layers see fewer.

A reducer stands in an attention as its mixer (`parts.attention`). It is softmax attention with its probabilities
written out, which a rule (`parts.token_rules`) turns into scores, or SDPA where the rule has a kernel that scores from
queries and keys (`kernels.token_votes`). The tokens that stay are gathered, in their order, by hooks: after the layer,
or between its attention and its feed-forward. In a pre-norm layer the latter leaves the stream itself whole until the
layer ends, since the layer adds to it: the feed-forward runs on what stays, the rest gets zeros.

Batches may be padded. Every text then keeps its own count, as it would alone; what a shorter one leaves over is
padding, which the attention function masks in later layers. All shapes follow from the input's, never from its values.

The reducers of a model share a `Reduction`. What it holds of a call is written anew by the next call before it is read,
and by a layer that is computed twice (gradient checkpointing). One call of a model at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from leanformers.errors import LeanError
from leanformers.kernels import token_votes
from leanformers.parts.token_rules import Rule, lowest, open_size, ranked

PLACES = ("after_layer", "before_feed_forward")
_CACHED = 4 << 20  # bytes of probabilities
_NAME = "kept_tokens"  # of the attribute by which modules find the shared state


@dataclass(eq=False)
class Kept:
    """What one place left in a call.

    index: int64 [batch, kept], ascending; ``length`` where a text keeps fewer than others. None: all stayed.
    real: bool [batch, kept], None where nothing is padding. counts: tokens that stay, int64 [batch] or one number.
    first: real tokens at the input, int64 [batch] or one number; first_length: positions there.
    """

    length: int
    index: Tensor | None
    real: Tensor | None
    counts: Tensor | int
    first: Tensor | int
    first_length: int


class Reduction:
    """What the reducers of one model share: the rule, and what each place left in the last call."""

    def __init__(self, rule: Rule, where: str, layers: Sequence[int]) -> None:
        self.rule, self.where, self.layers = rule, where, tuple(layers)
        self.left: dict[int, Kept] = {}

    def counts(self) -> list[Tensor | int]:
        """How many tokens each place that was not idle left in the last call: int64 [batch], or one number for all."""
        return [self.left[place].counts for place in sorted(self.left)]

    def below(self, place: int) -> Kept | None:
        """What the nearest place below left in this call; what an earlier call left from here on is forgotten."""
        for stale in [number for number in self.left if number >= place]:
            del self.left[stale]
        return self.left[max(self.left)] if self.left else None

    @torch.no_grad()
    def choose(self, place: int, scores: Tensor, real: Tensor | None) -> None:
        """Decide what stays; scores and real as of `Rule.scores`."""
        rule, before = self.rule, self.below(place)
        length = scores.shape[-1]
        first_length = length if before is None else before.first_length
        size = rule.count(place, length, first_length)
        if real is None:
            index = _top(scores, size, rule.specials)
            self.left[place] = Kept(length, index, None, size, first_length, first_length)
            return
        entering = real.sum(-1)
        first = entering if before is None else before.first
        counts = rule.count(place, entering, torch.as_tensor(first, device=real.device))
        index = _top(lowest(real, scores), open_size(size), rule.specials, counts)
        left = (index < length) & real.gather(1, index.clamp(max=length - 1))
        self.left[place] = Kept(length, index, left, counts, first, first_length)

    def gather(self, place: int, states: Tensor) -> Tensor:
        """States [batch, length, size] of the tokens that stay, [batch, kept, size]; left-over places hold any."""
        kept = self.left.get(place)
        if kept is None or kept.index is None:
            return states
        return rows(states, kept.index if kept.real is None else kept.index.clamp(max=kept.length - 1))

    def spread(self, place: int, states: Tensor) -> Tensor:
        """Undo `gather`, with zeros for what was dropped."""
        kept = self.left.get(place)
        if kept is None or kept.index is None:
            return states
        whole = states.new_zeros(states.shape[0], kept.length + 1, states.shape[2])
        index = kept.index[:, :, None].expand(-1, -1, states.shape[2])
        return whole.scatter(1, index, states)[:, : kept.length]


def _top(scores: Tensor, size: int, specials: int, counts: Tensor | None = None) -> Tensor:
    """The places of the largest scores [batch, length], ascending, int64 [batch, size]; see `token_votes.top`."""
    if token_votes.ranks(scores):
        return token_votes.top(scores, size, specials, counts)
    length = scores.shape[-1]
    front = torch.arange(length, device=scores.device) < specials
    index = ranked(scores.masked_fill(front, float("inf")), size)
    if counts is not None:
        stays = torch.arange(index.shape[1], device=scores.device) < counts[:, None]
        index = index.masked_fill(stays.logical_not(), length)
    return index.sort(-1).values


def rows(states: Tensor, index: Tensor) -> Tensor:
    """states [batch, length, size] at index [batch, kept] -> [batch, kept, size]."""
    batch, length, size = states.shape
    starts = torch.arange(batch, device=index.device)[:, None] * length
    return states.reshape(batch * length, size).index_select(0, (index + starts).flatten()).view(batch, -1, size)


@dataclass(eq=False)
class Place:
    """Where a module stands: ``number`` places of the reduction lie below it, or it is that place's own."""

    reduction: Reduction
    number: int

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """The attention mask [batch, 1, 1, kept] of this layer: the model's own where nothing was dropped."""
        below = self.reduction.below(self.number)
        if below is None:
            return mask
        return None if below.real is None else below.real[:, None, None]


class TokenReducer(nn.Module):
    """The mixer at a place; the reduction's ``where`` says when its choice is carried out."""

    reduces_tokens = True

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def idle(self) -> bool:
        """Whether this place does nothing, so that SDPA attends."""
        return self.place.reduction.rule.idle(self.place.number)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        padding: Tensor | None,
        causal: bool,
        scaling: float,
        dropout: float,
        position_bias: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        if causal or position_bias is not None:
            raise LeanError("Tokens can only be dropped where attention sees both sides and has no bias of positions.")
        groups = query.shape[1] // key.shape[1]
        wide, values = key, value
        if groups > 1:
            wide, values = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        shared, number = self.place.reduction, self.place.number
        found = shared.rule.attended(number, query.detach(), key.detach(), scaling, padding)
        if found is not None:
            shared.choose(number, found, padding)
            seen = None if padding is None else padding[:, None, None]
            mixed = functional.scaled_dot_product_attention(
                query, wide, values, attn_mask=seen, dropout_p=dropout if self.training else 0.0, scale=scaling
            )
            return mixed.transpose(1, 2)
        at_once = self._at_once(query)
        if at_once >= query.shape[0]:
            mixed, scores = self._attend(query, wide, values, key, padding, scaling, dropout)
        else:
            done = [
                self._attend(
                    query[part], wide[part], values[part], key[part], None if padding is None else padding[part],
                    scaling, dropout,
                )
                for part in (slice(low, low + at_once) for low in range(0, query.shape[0], at_once))
            ]  # fmt: skip
            mixed, scores = (torch.cat(parts) for parts in zip(*done, strict=True))
        shared.choose(number, scores, padding)
        return mixed

    def _at_once(self, query: Tensor) -> int:
        """Inputs whose probabilities are written out together: on a CPU as many as its caches hold, or they would go to
        memory and back with each vote."""
        batch, heads, length, _ = query.shape
        if query.device.type != "cpu" or torch.compiler.is_compiling() or query.requires_grad:
            return batch
        return max(1, _CACHED // (4 * heads * length * length))

    def _attend(
        self,
        query: Tensor,
        wide: Tensor,
        values: Tensor,
        key: Tensor,
        padding: Tensor | None,
        scaling: float,
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        """Mixed values [batch, length, heads, head_dim] and the rule's scores."""
        scores = (query * scaling) @ wide.transpose(-1, -2)  # [batch, heads, length, length]
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None].logical_not(), torch.finfo(scores.dtype).min)
        probabilities = scores.softmax(-1, dtype=torch.float32)
        place = self.place
        found = place.reduction.rule.scores(place.number, probabilities.detach(), key.detach(), padding)
        mixed = probabilities.to(values.dtype)
        if self.training:
            mixed = functional.dropout(mixed, dropout)
        return (mixed @ values).transpose(1, 2), found

    # -- cost, for the anatomy ------------------------------------------------------------------------------

    @property
    def before_feed_forward(self) -> bool:
        return self.place.reduction.where == "before_feed_forward"

    def kept(self, entering: int, first: int) -> int:
        """Tokens that stay of ``entering``, where the text had ``first``."""
        return entering if self.idle() else self.place.reduction.rule.count(self.place.number, entering, first)

    def score_flops(self, tokens: int, heads: int, width: int) -> int:
        """FLOPs of the rule for one text of so many tokens."""
        return 0 if self.idle() else self.place.reduction.rule.flops(self.place.number, tokens, heads, width)

    def extra_repr(self) -> str:
        return f"place={self.place.number}, rule={type(self.place.reduction.rule).__name__}"


# -- hooks: plain functions that find the shared state on the module, so that a copied model has its own --------


def mark(module: Any, place: Place) -> None:
    """Tell a module where it stands."""
    setattr(module, _NAME, place)


def place_of(module: Any) -> Place | None:
    found: Place | None = getattr(module, _NAME, None)
    return found


def reduction(model: nn.Module) -> Reduction | None:
    """What the reducers of a model share; None where no tokens are dropped."""
    found = next((place for place in map(place_of, model.modules()) if place is not None), None)
    return None if found is None else found.reduction


def gather_output(module: Any, args: Any, output: Any) -> Any:
    """Forward hook: the first output, or the only one, of the tokens that stay."""
    place = module.kept_tokens
    if isinstance(output, tuple):
        return (place.reduction.gather(place.number, output[0]), *output[1:])
    return place.reduction.gather(place.number, output)


def gather_input(module: Any, args: Any) -> Any:
    """Forward pre-hook: the first input of the tokens that stay."""
    place = module.kept_tokens
    return (place.reduction.gather(place.number, args[0]), *args[1:])


def spread_output(module: Any, args: Any, output: Any) -> Any:
    """Forward hook: zeros for the tokens that were dropped."""
    place = module.kept_tokens
    return place.reduction.spread(place.number, output)


def begin_call(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the whole model: the rule takes its keywords."""
    rule = module.kept_tokens.reduction.rule
    given = {name: kwargs[name] for name in rule.keywords if name in kwargs}
    inputs = {name: value for name, value in kwargs.items() if name not in given}
    rule.call(inputs, given)
    return args, inputs


def end_call(module: Any, args: Any, output: Any) -> None:
    """Forward hook of the whole model: nothing of a traced call is kept, nor what its keywords said."""
    held = module.kept_tokens.reduction
    if torch.compiler.is_compiling():
        held.left.clear()
    held.rule.call({}, {})
