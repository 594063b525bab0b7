"""What attention is beside softmax(query key) value: found on every family, and refused by whoever does not know it."""

from __future__ import annotations

import pytest
import torch

from families import TINY
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.lazy.support import refusal as refusal_to_prune
from leanformers.methods import get
from leanformers.packing.support import refusal, refusal_to_prefill
from leanformers.parts.attention_received import watched
from leanformers.surgery import DropLayers, PrunePrompt, SwapAttention, apply

MORE = {
    "mpnet": "adds a bias of positions to its attention scores",
    "t5": "adds a bias of positions to its attention scores",
    "t5-relu": "adds a bias of positions to its attention scores",
    "mt5": "adds a bias of positions to its attention scores",
    "deberta-v2": "scores positions within its attention",
    "deberta-v2-separate": "scores positions within its attention",
    "gemma3": "has layers that do not see all earlier tokens (sliding_attention)",
}


def capped():
    return TINY["gemma3"](layer_types=["full_attention"] * 3, attn_logit_softcapping=30.0)


def with_sinks():
    model = TINY["llama"]()
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    return model


def with_a_mixer():
    model = TINY["llama"]()
    apply(model, SwapAttention(path="layers.2.self_attn", mixer="top_k", settings={"k": 3}))
    return model


@pytest.mark.parametrize("family", TINY)
def test_every_family_says_what_its_attention_is_more_than(family):
    assert Anatomy.of(TINY[family]()).more_than_softmax() == MORE.get(family)


def test_windows_are_those_of_the_layers_that_name_them():
    assert "sliding windows" in Anatomy.of(TINY["mistral"](sliding_window=4)).more_than_softmax()
    model = TINY["gemma3"]()
    apply(model, DropLayers(stack="decoder", keep=(1,)))  # the one that sees all
    assert Anatomy.of(model).more_than_softmax() is None


def test_what_is_known_is_passed_over():
    model = with_a_mixer()
    apply(model, SwapAttention(path="layers.0.self_attn", mixer="top_k", settings={"k": 3}))
    model.config.sliding_window = 4
    anatomy = Anatomy.of(model)
    assert "sliding windows" in anatomy.more_than_softmax()
    assert "holds a mixer at 'layers.0.self_attn'" in anatomy.more_than_softmax("window")
    assert anatomy.more_than_softmax("window", "mixer") is None


@pytest.mark.parametrize(
    ("make", "words"),
    [(capped, "caps its attention scores"), (with_sinks, "has attention sinks")],
)
def test_whoever_attends_in_its_place_refuses_what_it_does_not_compute(make, words):
    """None of these knows of caps or sinks, and each would leave them out in silence."""
    anatomy = Anatomy.of(make())
    path = anatomy.layers[0].attention.path
    assert anatomy.more_than_softmax() == words
    assert words in refusal_to_prefill(anatomy.model)
    assert words in refusal_to_prune(anatomy)
    assert words in get("lean-attention").build().refuses(anatomy, None)
    assert "set k to null" in get("axformer").build().refuses(anatomy, None)
    for refused in (
        PrunePrompt(path=anatomy.layers[0].path, rate=0.5),
        SwapAttention(path=path, mixer="top_k", settings={"k": 3}),
    ):
        with pytest.raises(LeanError, match=words):
            refused.cost(anatomy)
    with pytest.raises(LeanError, match=words), watched(anatomy):
        pass


def test_a_mixer_is_neither_packed_nor_watched():
    model = with_a_mixer()
    assert "holds a mixer at 'layers.2.self_attn'" in refusal_to_prefill(model)
    with pytest.raises(LeanError, match="holds a mixer"), watched(Anatomy.of(model)):
        pass
    assert Anatomy.of(model).layers[2].attention.mixer is not None  # and it still stands there
    assert refusal(TINY["mpnet"]()) is None  # whose bias packing adds
