"""A layer recomputed from the mapped parts alone is the layer that the model computes.

While a model runs, an attention function of ours notes what each attention is given; hooks note what goes
into each layer and what comes out. Then every layer is computed again from its map: norms in their places,
projections by their rows, the feed-forward by its activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import ACT2FN
from transformers.masking_utils import eager_mask

from families import TINY, inputs, outputs, set_attention
from leanformers.anatomy import Anatomy, Attention, FeedForward, Layer, Projection

_NAME = "anatomy_test"
_calls: dict[int, Call] = {}


@dataclass(kw_only=True)
class Call:
    """What one attention was given: query, key, value [batch, heads, length, head_dim], mask plus position
    bias; or, where a family does not ask the attention interface, its probabilities."""

    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    scaling: float = 1.0
    bias: Any = 0
    probabilities: torch.Tensor | None = None


def _attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    call = Call(query=query, key=key, value=value, scaling=kwargs["scaling"])
    for bias in (mask, kwargs.get("position_bias")):
        call.bias = call.bias if bias is None else call.bias + bias
    _calls[id(module)] = call
    return _context(call, query, key, value).transpose(1, 2), None


def _context(call: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    probabilities = call.probabilities
    if probabilities is None:
        probabilities = (query @ key.transpose(-1, -2) * call.scaling + call.bias).softmax(dim=-1)
    return probabilities @ value  # [batch, heads, length, head_dim]


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, eager_mask)


def run(model: Any, batch: dict[str, Any]) -> dict[int, tuple[Any, Any, Any]]:
    """One forward pass: per module (by id) its positional and keyword inputs and its output; fills _calls."""
    anatomy, seen, handles = Anatomy.of(model), {}, []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen[id(module)] = (args, kwargs, output)

    modules = [norm.module for norm in anatomy.norms]
    for layer in anatomy.layers:
        modules += [layer.module, *(attention.module for attention in layer.attentions())]
    for module in modules:
        handles.append(module.register_forward_hook(note, with_kwargs=True))
    _calls.clear()
    own = model.config.model_type in ("mpnet", "deberta-v2")
    set_attention(model, "eager" if own else _NAME)
    outputs(model, {**batch, "output_attentions": True} if own else batch)
    for handle in handles:
        handle.remove()
    if own:
        for layer in anatomy.layers:
            _calls[id(layer.attention.module)] = Call(probabilities=seen[id(layer.attention.module)][2][1])
    return seen


def apply(projection: Projection, states: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(states, projection.weight(), projection.bias())


def attend(anatomy: Anatomy, attention: Attention, states: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The attention's output [batch, length, hidden_size], its heads checked against those of the model."""
    call = _calls[id(attention.module)]

    def heads(projection: Projection, of: torch.Tensor, norm: Any) -> torch.Tensor:
        split = apply(projection, of).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        return split if norm is None else norm(split)

    query = heads(attention.query, states, attention.query_norm)
    key = heads(attention.key, source, attention.key_norm)
    value = heads(attention.value, source, None)
    assert query.shape[1] == attention.num_attention_heads
    assert key.shape[1] == value.shape[1] == attention.num_key_value_heads
    if call.value is not None:
        assert_close(value, call.value)
        rotary = hasattr(anatomy.base, "rotary_emb")
        if not rotary or states.shape[1] == 1:  # position 0 is not rotated
            early = call.scaling == 1.0 and anatomy.family.name != "t5"  # scaled before the attention function
            assert_close(query * attention.head_dim**-0.5 if early else query, call.query)
            assert_close(key, call.key)
        query, key, value = call.query, call.key, call.value
    context = _context(call, query, key, value).transpose(1, 2).flatten(2)
    return apply(attention.output, context)


def feed(part: FeedForward, states: torch.Tensor) -> torch.Tensor:
    act = ACT2FN[part.activation]
    up = apply(part.up, states)
    return apply(part.down, act(up) if part.gate is None else act(apply(part.gate, states)) * up)


def compute(anatomy: Anatomy, layer: Layer, stream: torch.Tensor, source: torch.Tensor | None) -> torch.Tensor:
    """The layer's output [batch, length, hidden_size] from its input, by the map alone."""
    start = stream
    for name in ("attention", "cross_attention", "feed_forward"):
        part = getattr(layer, name)
        if part is None:
            continue
        states = start if layer.parallel else stream
        pre = layer.norm("pre", name)
        states = states if pre is None else pre.module(states)
        if isinstance(part, FeedForward):
            change = feed(part, states)
        elif part.cross:
            assert source is not None
            change = attend(anatomy, part, states, source)
        else:
            change = attend(anatomy, part, states, states)
        for place in ("output", "scale"):
            norm = layer.norm(place, name)
            change = change if norm is None else norm.module(change)
        post = layer.norm("post", name)
        stream = stream + change if post is None else post.module(stream + change)
    return stream


def assert_close(actual: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def first(entry: tuple[Any, Any, Any]) -> torch.Tensor:
    args, kwargs, _ = entry
    return args[0] if args else kwargs["hidden_states"]


def last(entry: tuple[Any, Any, Any]) -> torch.Tensor:
    output = entry[2]
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("length", [7, 1])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_layers_from_the_map(name: str, length: int) -> None:
    model = TINY[name]()
    seen = run(model, inputs(model, 2, length, padded=length > 1))
    anatomy = Anatomy.of(model)
    finals = {norm.reads: norm for norm in anatomy.final_norms}
    source = None
    for stack, layers in anatomy.stacks.items():
        for layer in layers:
            entry = seen[id(layer.module)]
            assert_close(compute(anatomy, layer, first(entry), source), last(entry))
            if layer.cross_attention is not None:
                given = seen[id(layer.cross_attention.module)][1]["key_value_states"]
                torch.testing.assert_close(given, source, rtol=0, atol=0)
        stream = last(seen[id(layers[-1].module)])
        if stack in finals:
            assert torch.equal(first(seen[id(finals[stack].module)]), stream)
            stream = last(seen[id(finals[stack].module)])
        source = stream


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_causality_is_as_mapped(name: str) -> None:
    """A change of the last position reaches earlier ones in a stack that is not causal, and only there."""
    model = TINY[name](head="base")
    anatomy, batch = Anatomy.of(model), inputs(model, 1, 8)

    def change(module: Any, args: Any, kwargs: Any) -> Any:
        stream = (args[0] if args else kwargs["hidden_states"]).clone()
        stream[:, -1] += torch.randn(stream.shape[-1])
        return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})

    for layers in anatomy.stacks.values():
        end = id(layers[-1].module)
        before = last(run(model, batch)[end])
        handle = layers[0].module.register_forward_pre_hook(change, with_kwargs=True)
        after = last(run(model, batch)[end])
        handle.remove()
        same = torch.equal(before[:, :-1], after[:, :-1])
        assert {same} == {layer.attention.causal for layer in layers}


@torch.no_grad()
def test_disentangled_queries_and_keys() -> None:
    """DeBERTa without relative positions is plain attention, so that its queries and keys can be checked."""
    model = TINY["deberta-v2-absolute"]()
    seen = run(model, inputs(model))
    layer = Anatomy.of(model).layers[1]
    part, stream = layer.attention, first(seen[id(layer.module)])
    query, key = (
        apply(projection, stream).unflatten(-1, (-1, part.head_dim)).transpose(1, 2)
        for projection in (part.query, part.key)
    )
    probabilities = (query @ key.transpose(-1, -2) / part.head_dim**0.5).softmax(-1)
    assert_close(probabilities, _calls[id(part.module)].probabilities)


@torch.no_grad()
def test_mpnet_queries_and_keys() -> None:
    """MPNet's attention with its shared bias at zero is plain attention."""
    model = TINY["mpnet"]()
    model.mpnet.encoder.relative_attention_bias.weight.zero_()
    seen = run(model, inputs(model))
    layer = Anatomy.of(model).layers[1]
    part, stream = layer.attention, first(seen[id(layer.module)])
    query, key = (
        apply(projection, stream).unflatten(-1, (-1, part.head_dim)).transpose(1, 2)
        for projection in (part.query, part.key)
    )
    probabilities = (query @ key.transpose(-1, -2) / part.head_dim**0.5).softmax(-1)
    assert_close(probabilities, _calls[id(part.module)].probabilities)
