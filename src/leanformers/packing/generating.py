"""`prepack(model)`: a decoder whose `generate` prefills a padded batch without its padding."""

from __future__ import annotations

import functools
import warnings
from types import MethodType
from typing import Any, TypeVar

import torch

from leanformers.errors import LeanError
from leanformers.packing.prefilling import FULL, Prefiller
from leanformers.packing.sharing import sharing
from leanformers.packing.support import PADDED, refusal_to_prefill

M = TypeVar("M", bound=torch.nn.Module)

# What generate can be asked for that a finished cache of the prompts cannot answer, and how to say it.
_OWN_WAY = {
    "cache_implementation": "asks for a cache of its own layout",
    "prefill_chunk_size": "cuts the prompts into chunks",
    "output_attentions": "asks for attention weights of the prompts",
    "output_hidden_states": "asks for hidden states of the prompts",
    "prompt_lookup_num_tokens": "looks up tokens in the prompt",
    "assistant_early_exit": "drafts tokens by an early exit",
    "use_mtp": "drafts tokens ahead",
    "token_healing": "changes the prompts' last tokens",
    "dola_layers": "contrasts layers",
    "penalty_alpha": "searches by contrast",
    "constraints": "searches under constraints",
    "force_words_ids": "searches under constraints",
}
_OWN_ARGUMENTS = {"assistant_model": "drafts with another model", "custom_generate": "decodes by a loop of its own"}
_KNOWN = {"input_ids", "attention_mask", "use_cache", "return_dict", "logits_to_keep", "tokenizer", "synced_gpus"}
_KNOWN |= {"streamer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "past_key_values"}


def prepack(model: M, *, compile: bool = False, graphs: bool = False) -> M:
    """The same decoder, whose `generate` prefills the prompts of a padded batch without padding.

    Left-padded batches with an attention mask go in as ever, and the same tokens come out; only rounding differs, which
    may turn a near tie in half precision. Where packing has nothing to gain (one prompt, or hardly any padding) the
    batch is prefilled padded; where `generate` is asked for what packed prompts do not serve (an own cache, an
    assistant, states of the prompts), it is too, and a warning says why, once.

    Args:
        model: a decoder of transformers with its language-model head, edited or not.
        compile: fuse the packed pass by torch.compile (dynamic shapes); the first calls take up to a minute. It holds
            the packed keys and values of all layers until they are unpacked.
        graphs: replay CUDA graphs, which saves the launches of small batches; on a CPU it changes nothing. Make edits
            before: a graph goes on reading the weights that were there.

    Returns:
        A model of the same class that shares every weight with the one given, which is left as it was.

    Raises:
        LeanError: a model whose prompts cannot be packed; the sentence says why.
    """
    if (refused := refusal_to_prefill(model)) is not None:
        raise LeanError(refused)
    packed = sharing(model)
    switch_on(packed, compile=compile, graphs=graphs)
    return packed


def is_prepacked(model: torch.nn.Module) -> bool:
    """Whether the model's `generate` prefills without padding."""
    return isinstance(getattr(model, "prepacker", None), Prepacker)


def switch_on(model: Any, *, compile: bool = False, graphs: bool = False) -> None:
    """Let this model's `generate` prefill without padding.

    Raises:
        LeanError: its prompts cannot be packed, it has no head to generate with, or it does so already.
    """
    if is_prepacked(model):
        raise LeanError(f"{type(model).__name__} prefills without padding already.")
    if (refused := refusal_to_prefill(model)) is not None:
        raise LeanError(refused)
    if not model.can_generate():
        raise LeanError(f"{type(model).__name__} has no head to generate with: load it by AutoModelForCausalLM.")
    model.prepacker = Prepacker(compile=compile, graphs=graphs)
    model.generate = MethodType(_like(type(model).generate), model)


def _like(stock: Any) -> Any:
    """`generate` under the stock signature."""

    @functools.wraps(stock)
    def generate(self: Any, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        cache = self.prepacker(self, inputs, generation_config, args, kwargs)
        if cache is not None:
            kwargs = {**kwargs, "past_key_values": cache}
        return stock(self, inputs, generation_config, *args, **kwargs)

    return generate


class Prepacker:
    """Prefills what `generate` was given, if it can; hangs on a model as `prepacker`."""

    def __init__(self, *, compile: bool, graphs: bool) -> None:
        self.compile, self.graphs = compile, graphs
        self._prefiller: Prefiller | None = None
        self._told: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepacker:
        """A copied model has parts of its own, and what is compiled belongs to one model."""
        return Prepacker(compile=self.compile, graphs=self.graphs)

    def prefiller(self, model: Any) -> Prefiller:
        if self._prefiller is None:
            self._prefiller = Prefiller(model, compile=self.compile, graphs=self.graphs)
        return self._prefiller

    def __call__(
        self, model: Any, inputs: Any, config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any | None:
        """A cache of the prompts but for their last tokens; None to let `generate` prefill as ever."""
        ids = kwargs.get("input_ids") if inputs is None else inputs
        mask = kwargs.get("attention_mask")
        if not isinstance(ids, torch.Tensor) or not isinstance(mask, torch.Tensor) or len(ids) == 1 or bool(mask.all()):
            return None  # nothing says that there is padding
        try:
            self._check(model, config, args, kwargs)
            real = mask != 0
            if mask.shape != ids.shape or bool((~real[:, 1:] & real[:, :-1]).any()):
                raise LeanError("Packed prompts are padded on the left alone: set tokenizer.padding_side to 'left'.")
            prefiller = self.prefiller(model)
            prompts = prefiller.read(ids, mask)
            path = prefiller.path()
            if prompts.longest < 2 or prefiller.share(prompts, path) > FULL:
                return None
            cache = prefiller.cache(prompts, path, width=ids.shape[1] - 1)
            if (copies := self._copies(model, config, kwargs)) > 1:
                cache.batch_repeat_interleave(copies)
            return cache
        except LeanError as error:
            if str(error) not in self._told:
                self._told.add(str(error))
                warnings.warn(f"The prompts were prefilled padded. {error}", stacklevel=3)
            return None

    def _check(self, model: Any, config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse what a cache of the prompts cannot answer."""
        name = type(model).__name__
        own = [words for key, words in _OWN_WAY.items() if _setting(model, config, kwargs, key)]
        own += [words for key, words in _OWN_ARGUMENTS.items() if kwargs.get(key) is not None]
        if args:
            own.append("was given arguments by their place, which are not looked into")
        if own:
            raise LeanError(f"{name}.generate {own[0]}, and packed prompts do not serve that: {PADDED}.")
        if kwargs.get("past_key_values") is not None:
            raise LeanError(f"{name}.generate was given a cache, and prompts are packed into a new one: {PADDED}.")
        if _setting(model, config, kwargs, "use_cache") is False:
            raise LeanError(f"{name}.generate keeps no cache, so there is none to prefill: leave out use_cache=False.")
        for key, value in kwargs.items():
            if value is not None and key not in _KNOWN and not hasattr(model.generation_config, key):
                raise LeanError(f"{name}.generate was given {key!r}, which packed prompts do not know: {PADDED}.")

    def _copies(self, model: Any, config: Any, kwargs: dict[str, Any]) -> int:
        """How many continuations `generate` writes for each prompt."""
        return max(_setting(model, config, kwargs, name) or 1 for name in ("num_beams", "num_return_sequences"))


def _setting(model: Any, config: Any, kwargs: dict[str, Any], name: str) -> Any:
    """A setting of `generate` as it counts: the argument, else the config given, else the model's own."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    found = (getattr(one, name, None) for one in (config, model.generation_config) if one is not None)
    return next((value for value in found if value is not None), None)
