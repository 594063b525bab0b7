"""Models that write, exported with their key-value cache: for decoders one graph that reads a prompt, then writes.

With an empty cache it is the prefill, with a filled one the decode step, so that the weights are stored once.
In OpenVINO the cache is the graph's own state, and the graph takes what OpenVINO's own generation takes:
input_ids, attention_mask, position_ids and beam_idx. In ONNX the cache is a further input and output. An
encoder-decoder becomes two graphs, see `encoder_decoder`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from leanformers.errors import LeanError
from leanformers.runtimes.blaming import blaming
from leanformers.runtimes.encoder_decoder import export_encoder_decoder, write
from leanformers.runtimes.exported import exporter_class, finished, owned, plain_config, undisturbed
from leanformers.runtimes.hushing import hushed
from leanformers.runtimes.quantising import unrounded

FORMS = ("onnx", "openvino")
PROMPTS = ("Once upon a time there was", "The")  # of different lengths, so that the padding is traced as well


def export_generation(model: Any, tokenizer: Any, form: str) -> Any:
    """Export a model that writes with its cache.

    Args:
        model: a causal language model or an encoder-decoder, lean or not, on the CPU; it is put into evaluation mode.
        tokenizer: the model's; its prompts are what is traced. None where it reads sound.
        form: "onnx" or "openvino".

    Returns:
        transformers' `ExportedModel` with the generation config: one graph, "model", of a decoder, and two of an
        encoder-decoder, "encoder" and "decoder". `greedy` runs it.

    Raises:
        LeanError: an unknown form, a model that does not write, or one that cannot be exported, by layer.
    """
    if form not in FORMS:
        raise LeanError(f"A model with its cache is not exported to {form!r}; choose one of {', '.join(FORMS)}.")
    if not getattr(model, "can_generate", bool)():
        raise LeanError(f"{type(model).__name__} is no model that writes by itself: export it with its task instead.")
    if getattr(model.config, "is_encoder_decoder", False):
        inputs = features(model) if model.main_input_name == "input_features" else prompts(tokenizer)
        return export_encoder_decoder(model.eval(), inputs, form)
    from transformers.exporters.utils import decompose_for_generation

    model = owned(model.eval(), form)
    inputs = prompts(tokenizer)
    with hushed(), undisturbed(model), unrounded(model), blaming(model, form):
        _, sample = decompose_for_generation(model, inputs, multi_token_decode=True)["decode"]
        exported = exporter_class(form)().export(model, sample, {"dynamic": True})
    exported.config, exported.generation_config = plain_config(model), model.generation_config
    return finished(exported)


def prompts(tokenizer: Any) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [2, length] of two prompts, padded on the left as for writing."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] or [0] for text in PROMPTS]
    length = max(3, *map(len, rows))
    padding = tokenizer.pad_token_id or 0
    ids = torch.tensor([[padding] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def features(model: Any) -> dict[str, torch.Tensor]:
    """input_features [2, bins, frames] of two silences, in the size that a speech model takes."""
    config = model.config
    return {"input_features": torch.zeros(2, config.num_mel_bins, 2 * config.max_source_positions)}


@torch.no_grad()
def score(exported: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Logits [batch, length, vocab_size] of whole texts, read with an empty cache.

    Args:
        exported: from `export_generation` or `open_exported`.
        input_ids, attention_mask: [batch, length], padded on either side.
    """
    runner = exported.runners["model"]
    run = _with_state(runner) if str(exported.export_format) == "openvino" else _with_cache(runner, exported, input_ids)
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return run({"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}).clone()


@torch.no_grad()
def greedy(exported: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Write `new_tokens` tokens with an exported model, the most likely one each time, past any end of text.

    Args:
        exported: from `export_generation` or `open_exported`. One that reads sound is run by `encoder_decoder.write`.
        input_ids, attention_mask: [batch, length], padded on the left; for an encoder on either side.

    Returns:
        The new ids [batch, new_tokens].
    """
    if "encoder" in exported.components:
        return write(exported, {"input_ids": input_ids, "attention_mask": attention_mask}, new_tokens)
    runner = exported.runners["model"]
    run = _with_state(runner) if str(exported.export_format) == "openvino" else _with_cache(runner, exported, input_ids)
    step, mask, written = input_ids, attention_mask, []
    for _ in range(new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
        logits = run({"input_ids": step, "attention_mask": mask, "position_ids": positions})
        step = logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(step)], dim=1)
        written.append(step)
    return torch.cat(written, dim=1)


def _with_state(runner: Any) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """A step of an OpenVINO graph. transformers' runner looks for the cache that has become the graph's state."""
    request, known = runner.request, {name for port in runner.compiled_model.inputs for name in port.get_names()}
    request.reset_state()

    def run(given: dict[str, torch.Tensor]) -> torch.Tensor:
        rows = {"beam_idx": torch.arange(len(given["input_ids"]), dtype=torch.int32)}
        feed = {name: value.numpy() for name, value in {**given, **rows}.items() if name in known}
        return torch.from_numpy(request.infer(feed)["logits"])

    return run


def _with_cache(
    runner: Any, exported: Any, input_ids: torch.Tensor
) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """A step of an ONNX graph, which is handed the cache that it gave before."""
    held = {"past_key_values": _empty_cache(exported, len(input_ids))}

    def run(given: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs = runner(**{name: value for name, value in given.items() if name in runner.metadata.kwargs}, **held)
        held["past_key_values"] = outputs.past_key_values
        return outputs.logits

    return run


def _empty_cache(exported: Any, rows: int) -> Any:
    """A cache of no tokens in the shapes that an ONNX graph takes."""
    from transformers import DynamicCache

    pairs: dict[int, dict[str, torch.Tensor]] = {}
    for value in exported.program.graph.inputs:
        path = value.name.removeprefix("input.").split(".")  # past_key_values.layers.0.keys
        if path[0] == "past_key_values" and path[3] in ("keys", "values"):  # a sliding layer also counts its tokens
            heads, width = (int(str(value.shape[axis]).strip("'")) for axis in (1, 3))
            pairs.setdefault(int(path[2]), {})[path[3]] = torch.empty(rows, heads, 0, width)
    cache = DynamicCache(config=exported.config)
    for layer in sorted(pairs):
        cache.update(pairs[layer]["keys"], pairs[layer]["values"], layer)
    return cache
