"""The cache of LazyLLM (Fu et al., 2024, arXiv 2407.14057): keys and values of each layer, and the states of tokens
that wait in front of one.

Each token is known at the layers 0..d-1 of its depth d: their keys and values are here, at every layer of its own
count of tokens, and the hidden state that enters layer d waits in the auxiliary cache of layer d. No token passes a
layer twice, so all steps together never cost more than the dense model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from leanformers.errors import LeanError
from leanformers.lazy.pruner import layers_of
from leanformers.lazy.rows import Rows

_PLACED = ("position_embeddings", "position_ids")  # what a layer is given for each token that it runs
_UNKNOWN = ("output_attentions", "output_hidden_states")


@dataclass(eq=False)
class Step:
    """One forward pass, between two layers.

    first, count: position and number of the tokens that came in. visible: positions that the next layer sees (S),
    running: those of them that it computes (R), both int64, ascending, the last token at the end of both. revived:
    whether some of R had waited. scores: of S at this layer, float32, where it prunes.
    """

    first: int
    count: int
    visible: Tensor
    running: Tensor
    revived: bool = False
    layer: int = -1
    scores: Tensor | None = None

    def to(self, device: torch.device) -> None:
        self.visible, self.running = self.visible.to(device), self.running.to(device)

    def mask(self) -> Tensor | None:
        """Which keys each query sees, bool [1, 1, running, visible]; None where SDPA's own causality says it."""
        if len(self.running) in (1, len(self.visible)):
            return None
        return (self.running[:, None] >= self.visible)[None, None]

    def observe(self, query: Tensor, key: Tensor, scaling: float) -> None:
        self.scores = last_token_scores(query, key, scaling)


def last_token_scores(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """How much the last query looks at each key: attention probability, mean over heads, float32 [keys].

    query [1, heads, queries, head_dim], key [1, key/value heads, keys, head_dim].
    """
    grouped = query[0, :, -1].view(key.shape[1], -1, query.shape[-1])  # [key/value heads, group, head_dim]
    return ((grouped @ key[0].transpose(1, 2)).float() * scaling).softmax(-1).mean((0, 1))


class LazyCache(Cache):
    """Pass it as ``past_key_values`` to a model that holds pruners, for one sequence.

    Logits are those of the tokens that reached the end, the last one always among them; the rest is NaN.

    Args:
        model: that the method ``lazyllm`` was applied to.
        rates: by layer, the share of its tokens that the deeper layers do without; by default what the model's own
            pruners say. ``{}`` is the dense model.

    Raises:
        LeanError: the model has no pruners, or a rate is outside [0, 1).
    """

    def __init__(self, model: Any, rates: Mapping[int, float] | None = None) -> None:
        super().__init__(layers=[])
        modules = layers_of(model)
        if rates is None:
            held = {index: getattr(module, "pruner", None) for index, module in enumerate(modules)}
            rates = {index: pruner.rate for index, pruner in held.items() if pruner is not None}
        for index, rate in rates.items():
            if index not in range(len(modules)) or not 0 <= rate < 1:
                raise LeanError(
                    f"Layer {index} cannot drop {rate} of its tokens: give one of the {len(modules)} layers a rate "
                    "from 0 to below 1."
                )
        self.rates = dict(rates)
        self._index = {id(module): index for index, module in enumerate(modules)}
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        count = len(self._index)
        self.length = 0
        self.kv, self.waiting = [Rows() for _ in range(count)], [Rows() for _ in range(count)]
        self._placed: dict[tuple[str, int], Rows] = {}
        self.step: Step | None = None

    # -- what the paper decides ------------------------------------------------------------------------------------

    def keep(self, layer: int, scores: Tensor, visible: Tensor) -> Tensor:
        """Which of the visible tokens the layers after ``layer`` see, as ascending indices.

        All but the lowest int(rate * count) of the scores; never the last token, nor the first, on which attention
        rests. scores float32 [visible], visible int64 [visible] are positions.
        """
        count = len(scores)
        stay = max(count - int(self.rates[layer] * count), min(2, count))
        scores = scores.clone()
        scores[0] = scores[-1] = float("inf")
        return scores.topk(stay).indices.sort().values

    def depth(self) -> Tensor:
        """At how many layers each token is known, int64 [length]."""
        depth = torch.zeros(self.length, dtype=torch.int64)
        for rows in self.kv:
            depth[rows.positions.cpu()] += 1
        return depth

    def computed(self) -> float:
        """The share of all tokens at all layers that was computed so far."""
        return sum(rows.count for rows in self.kv) / max(1, self.length * len(self.kv))

    def memory(self) -> dict[str, int]:
        """Bytes of the tokens that are held: keys and values, and states that wait."""
        return {"kv": sum(rows.bytes for rows in self.kv), "waiting": sum(rows.bytes for rows in self.waiting)}

    # -- one forward pass ------------------------------------------------------------------------------------------

    def begin(self, base: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the base model runs.

        Raises:
            LeanError: what the pass asks for cannot be had of a pruned sequence.
        """
        given = {**dict(zip(_names(type(base).forward), args, strict=False)), **kwargs}
        ids = given.get("input_ids")
        tokens = ids if ids is not None else given.get("inputs_embeds")
        assert isinstance(tokens, Tensor)
        self._check(base, tokens, given)
        first, count = self.length, tokens.shape[1]
        positions = torch.arange(first + count, device=tokens.device)
        self.step = Step(first, count, visible=positions, running=positions[first:])

    def _check(self, base: Any, tokens: Tensor, given: Mapping[str, Any]) -> None:
        name = type(base).__name__
        if tokens.shape[0] != 1:
            raise LeanError(
                f"{name} prunes its prompt by one sequence's attention, and a batch of {tokens.shape[0]} was given: "
                "run the sequences one by one."
            )
        mask = given.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all())):
            raise LeanError(f"{name} prunes a prompt without padding: give no attention mask, or one of ones.")
        if base.training:
            raise LeanError(f"{name} prunes in inference only: call model.eval(), or give no LazyCache.")
        asked = [one for one in _UNKNOWN if given.get(one) or getattr(base.config, one, False)]
        if asked:
            raise LeanError(f"{name} runs on fewer tokens in each layer, so there is no {asked[0]}: leave it out.")
        if not str(base.config._attn_implementation).endswith("leanformers"):
            raise LeanError(
                f"{name} ranks tokens within its attention, which is set to {base.config._attn_implementation!r}: call "
                "model.set_attn_implementation('leanformers')."
            )

    def enter(self, layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before a layer: bring back what it needs, and give it masks and positions of what it runs."""
        step = self._running()
        given = {**dict(zip(_names(type(layer).forward), args, strict=False)), **kwargs}
        hidden = given.pop("hidden_states")
        if id(layer) not in self._index:
            raise LeanError("This LazyCache was made for another model: make one of the model that is called.")
        step.layer, step.scores = self._index[id(layer)], None
        step.to(hidden.device)
        if step.layer == 0:
            self.length = step.first + step.count
            self._remember(given)
        hidden = self._revive(hidden)
        given["attention_mask"] = step.mask()
        given.update(self._positions(given))
        if self.rates.get(step.layer) and step.layer < len(self.kv) - 1:
            given["observe"] = step.observe
        return (hidden,), given

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the running tokens' [1, heads, running, head_dim]; returns those of all visible ones, by position."""
        step, rows = self._running(), self.kv[self._running().layer]
        rows.put(step.running, key_states, value_states, length=self.length, ordered=not step.revived)
        if len(step.running) == len(step.visible):
            return key_states, value_states
        key, value = rows.get(step.visible)
        return key, value

    def leave(self, layer: Any, output: Any) -> Any:
        """After a layer: its output without the tokens that the next one does not see."""
        step = self._running()
        hidden = output[0] if isinstance(output, tuple) else output
        if step.layer == len(self.kv) - 1:
            hidden = self._answer(hidden)
        elif step.scores is not None:
            hidden = self._prune(hidden, self.keep(step.layer, step.scores, step.visible))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _prune(self, hidden: Tensor, kept: Tensor) -> Tensor:
        """hidden [1, running, hidden_size] -> what runs on; the rest waits in front of the next layer."""
        step = self._running()
        seen, gone = len(step.visible), len(step.visible) - len(kept)
        if not gone:
            return hidden
        marked = torch.zeros(self.length, dtype=torch.bool, device=hidden.device)
        marked[step.visible[kept]] = True
        step.visible = step.visible[kept]
        if len(step.running) == 1:
            return hidden  # the last token alone, which stays
        inside = marked[step.running]
        if len(step.running) == seen:  # their numbers are known, and a GPU need not be waited for
            stay, leave = kept, _places(~inside, gone)
        else:
            stay, leave = _places(inside), _places(~inside)
        waiting = self.waiting[step.layer + 1]
        waiting.put(step.running[leave], hidden[:, leave], length=self.length, ordered=False)
        step.running = step.running[stay]
        return hidden[:, stay]

    def _revive(self, hidden: Tensor) -> Tensor:
        """hidden [1, running, hidden_size] with the visible tokens that wait in front of this layer, by position."""
        step, waiting = self._running(), self.waiting[self._running().layer]
        if not waiting.count:
            return hidden
        wanted = step.visible[waiting.has(step.visible)]
        if not len(wanted):
            return hidden
        (states,) = waiting.take(wanted)
        step.running, order = torch.cat([step.running, wanted]).sort()
        step.revived = True
        return torch.cat([hidden, states.to(hidden.device)], 1)[:, order]

    def _remember(self, given: Mapping[str, Any]) -> None:
        """Keep what the model says of the new tokens' positions: revived ones need it again, at deeper layers."""
        step = self._running()
        for name in _PLACED:
            for index, tensor in enumerate(_listed(given.get(name))):
                if name == "position_ids":
                    tensor = tensor[..., None]
                rows = self._placed.setdefault((name, index), Rows())
                rows.put(step.running, tensor, length=self.length)

    def _positions(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the model says of the running tokens' positions, in the form in which it says it."""
        step, found = self._running(), {}
        if len(step.running) == step.count and not step.revived:
            return {}
        for name in _PLACED:
            if given.get(name) is None:
                continue
            tables = [self._placed[name, index] for index in range(len(_listed(given[name])))]
            placed = [table.get(step.running)[0].to(step.running.device) for table in tables]
            found[name] = placed[0].squeeze(-1) if name == "position_ids" else type(given[name])(placed)
        return found

    def _answer(self, hidden: Tensor) -> Tensor:
        """hidden [1, running, hidden_size] -> [1, tokens that came in, hidden_size], NaN for those dropped."""
        step = self._running()
        if step.count == 1:
            return hidden[:, -1:]
        if len(step.running) == step.count and not step.revived:
            return hidden
        whole = hidden.new_full((1, step.count + 1, hidden.shape[-1]), float("nan"))
        whole[:, (step.running - step.first + 1).clamp_min(0)] = hidden  # earlier tokens go to a row before the first
        return whole[:, 1:]

    def _running(self) -> Step:
        if self.step is None:
            raise LeanError("A LazyCache is filled by the model that it was made for: call that as a whole.")
        return self.step

    # -- what transformers asks of a cache ---------------------------------------------------------------------------

    is_compileable = False
    is_initialized = False
    is_croppable = False

    def __len__(self) -> int:
        return len(self.kv)

    def __repr__(self) -> str:
        return f"LazyCache(length={self.length}, layers={len(self)}, rates={self.rates})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, at whatever depth they are."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise LeanError("A LazyCache holds one sequence and takes no token back: use neither beams nor assistants.")

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = activate_past_recording = _refuse
    offload = prefetch = _refuse


@lru_cache(maxsize=64)
def _names(forward: Any) -> tuple[str, ...]:
    """The names of a method's arguments, in order."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _listed(tensors: Any) -> list[Tensor]:
    return [] if tensors is None else [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _places(mask: Tensor, count: int | None = None) -> Tensor:
    """Where a mask is true; with the count known, a GPU is not waited for."""
    if count is not None and mask.is_cuda:
        return torch.nonzero_static(mask, size=count)[:, 0]
    return mask.nonzero()[:, 0]
