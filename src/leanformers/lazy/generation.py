"""`generate` of a model that prunes: transformers' own, on a `LazyCache`."""

from __future__ import annotations

from typing import Any

from leanformers.errors import LeanError

_DENSE = "load the model without its pruning, or leave that out"
_ONE = {"num_beams": 1, "num_return_sequences": 1}
_NONE = ("cache_implementation", "prompt_lookup_num_tokens", "prefill_chunk_size", "assistant_early_exit")
_FORBIDDEN = ("assistant_model", "custom_generate")


def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As the model's class generates, with a new `LazyCache` unless one is given as ``past_key_values``.

    Raises:
        LeanError: several sequences at once, or another cache, or a way of decoding that needs one.
    """
    from leanformers.lazy.cache import LazyCache

    refused = _refusal(self, args, kwargs)
    if refused is not None:
        raise LeanError(f"{type(self).__name__} prunes its prompt and {refused}.")
    if kwargs.get("past_key_values") is None:
        kwargs["past_key_values"] = LazyCache(self)
    return type(self).generate(self, *args, **kwargs)


def _refusal(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    from leanformers.lazy.cache import LazyCache

    config = kwargs.get("generation_config") or next((one for one in args if hasattr(one, "num_beams")), None)
    config = config or model.generation_config

    def setting(name: str) -> Any:
        return kwargs[name] if name in kwargs else getattr(config, name, None)

    for name, one in _ONE.items():
        if (setting(name) or one) > one:
            return f"keeps the state of one sequence only: {name} is {setting(name)}, make it 1"
    for name in _NONE:
        if setting(name) is not None:
            return f"has a cache of its own, which does not go with {name}: {_DENSE}"
    for name in _FORBIDDEN:
        if kwargs.get(name) is not None:
            return f"cannot take tokens back, which {name} may do: {_DENSE}"
    if setting("use_cache") is False:
        return "keeps what it left out in its cache, so use_cache cannot be False"
    cache = kwargs.get("past_key_values")
    if cache is not None and not isinstance(cache, LazyCache):
        return f"needs a LazyCache, not a {type(cache).__name__}: leave past_key_values out"
    return None
