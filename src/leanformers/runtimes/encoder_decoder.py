"""Encoder-decoders exported to write: one graph that reads, and one that writes token by token.

The first takes what the encoder takes. It gives the keys and values of the encoder's states for every layer of the
decoder, and a cache without tokens. The second takes tokens, those keys and values, and the cache; it gives logits and
the longer cache. So no weights are stored twice but those of a table that both embed with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from leanformers.runtimes.blaming import blaming
from leanformers.runtimes.calling import dynamic_shapes
from leanformers.runtimes.exported import exporter_class, finished, owned, plain_config, undisturbed
from leanformers.runtimes.hushing import hushed
from leanformers.runtimes.quantising import unrounded

Pairs = list[list[torch.Tensor]]
"""Keys and values [batch, heads, length, head_dim] of every layer."""

READ, WRITTEN = 5, 4  # lengths of the sample, unlike each other and the number of rows


class Reading(nn.Module):
    """Keys and values of the encoder's states, and a cache of no tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
    ) -> dict[str, Pairs]:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "input_features": input_features}
        inputs = {name: value for name, value in given.items() if value is not None}
        rows = next(iter(inputs.values())).shape[0]  # len() would be traced as a constant
        start = torch.full((rows, 1), self.model.config.decoder_start_token_id, dtype=torch.int64)
        # The decoder reads one token for the sake of its keys and values; the rest of that is in no graph.
        cache = self.model(**inputs, decoder_input_ids=start, use_cache=True, return_dict=True).past_key_values
        shapes = [[side.shape for side in pair] for pair in _pairs(cache.self_attention_cache)]
        past = [[torch.zeros(rows, heads, 0, width) for _, heads, _, width in pair] for pair in shapes]
        return {"cross": _pairs(cache.cross_attention_cache), "past": past}


class Writing(nn.Module):
    """One step of the decoder, by any number of tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, decoder_input_ids: torch.Tensor, cross: Pairs, past: Pairs, attention_mask: torch.Tensor | None = None
    ) -> dict[str, Any]:
        from transformers import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        keys, config = cross[0][0], self.model.config
        # Of the states themselves nothing is read but their sizes, since their keys and values are given.
        states = BaseModelOutput(last_hidden_state=keys.new_zeros(keys.shape[0], keys.shape[2], config.hidden_size))
        given = {} if attention_mask is None else {"attention_mask": attention_mask}
        found = self.model(
            decoder_input_ids=decoder_input_ids,
            encoder_outputs=states,
            past_key_values=EncoderDecoderCache(_cache(past), _cache(cross)),
            use_cache=True,
            return_dict=True,
            **given,
        )
        return {"logits": found.logits, "past": _pairs(found.past_key_values.self_attention_cache)}


def export_encoder_decoder(model: Any, inputs: dict[str, torch.Tensor], form: str) -> Any:
    """Export a model that reads with its encoder and writes with its decoder.

    Args:
        model: in evaluation mode, on the CPU.
        inputs: what its encoder takes, at least two rows.
        form: "onnx" or "openvino".

    Returns:
        transformers' `ExportedModel` of two graphs, "encoder" and "decoder", with the generation config.

    Raises:
        LeanError: it cannot be exported, by layer.
    """
    from transformers.exporters import ExportedModel

    model = owned(model, form)
    reading, writing = Reading(model).eval(), Writing(model).eval()
    with torch.no_grad():
        found = reading(**inputs)
        ids = torch.full((len(next(iter(inputs.values()))), WRITTEN), model.config.decoder_start_token_id)
        mask = {name: value for name, value in inputs.items() if name == "attention_mask"}
        sample = {"decoder_input_ids": ids, **mask, "cross": found["cross"]}
        sample["past"] = writing(**sample, past=found["past"])["past"]
    components = {}
    with hushed(), unrounded(model), blaming(model, form):
        for name, module, given in (("encoder", reading, inputs), ("decoder", writing, sample)):
            settings = {"dynamic_shapes": _shapes(given)}
            with undisturbed(module):
                components[name] = exporter_class(form)().export(module, dict(given), settings).components["model"]
    exported = ExportedModel(components, form, config=plain_config(model), generation_config=model.generation_config)
    return finished(exported)


@torch.no_grad()
def write(exported: Any, inputs: dict[str, torch.Tensor], new_tokens: int, start: Sequence[int] = ()) -> torch.Tensor:
    """Write `new_tokens` tokens, the most likely one each time, past any end of text.

    Args:
        exported: from `export_encoder_decoder` or `open_exported`.
        inputs: what the encoder takes.
        start: what the decoder begins with; without it the config's token to start with.

    Returns:
        The new ids [batch, new_tokens], without the start.
    """
    read = exported.runners["encoder"](**inputs)
    mask = {name: value for name, value in inputs.items() if name == "attention_mask"}
    rows = len(next(iter(inputs.values())))
    step = torch.tensor([list(start) or [exported.config.decoder_start_token_id]] * rows)
    past, written = read["past"], []
    for _ in range(new_tokens):
        found = exported.runners["decoder"](decoder_input_ids=step, cross=read["cross"], past=past, **mask)
        step, past = found["logits"][:, -1:].argmax(-1), found["past"]
        written.append(step)
    return torch.cat(written, dim=1)


def _pairs(cache: Any) -> Pairs:
    return [[layer.keys, layer.values] for layer in cache.layers]


def _cache(pairs: Pairs) -> Any:
    """A cache that holds these tensors as they are."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _shapes(sample: dict[str, Any]) -> dict[str, Any]:
    """Rows and lengths vary, of every cache by itself."""
    from torch.export import Dim

    vary = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    caches = {name: [[vary, vary] for _ in value] for name, value in sample.items() if isinstance(value, list)}
    return dynamic_shapes(sample) | caches
