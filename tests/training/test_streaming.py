"""Batches in front of a block: walking through them gives the model's own states, and holds no others."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from families import TINY, inputs, outputs
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.training.blockwise import Blocks
from leanformers.training.streaming import hold


def held_of(name: str, **options):
    model = TINY[name](**options)
    blocks = Blocks(Anatomy.of(model), lambda batch: outputs(model, batch))
    batches = [inputs(model, seed=seed, padded=True) for seed in range(2)]
    return model, batches, hold(blocks, batches)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "opt", "mistral", "gemma3", "vit"])
def test_walking_gives_the_states_of_the_model(name):
    model, batches, held = held_of(name)
    layers = [layer.module for layer in Anatomy.of(model).layers]
    for one, batch in zip(held, batches, strict=True):
        for index, module in enumerate(layers):
            seen = []
            handle = module.register_forward_pre_hook(
                lambda _, args, kwargs, seen=seen: seen.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
            outputs(model, batch)
            handle.remove()
            torch.testing.assert_close(one.tokens(one.states), one.tokens(seen[0]), rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                one.states = one.run(index)


def test_watching_runs_a_block_no_further_than_needed():
    _, _, held = held_of("llama")
    layer = held[0]._start.modules[1]
    calls = []
    layer.mlp.down_proj.register_forward_hook(lambda *_: calls.append("down"))
    with torch.no_grad():
        stream, output = held[0].watch(1, [layer.input_layernorm], [layer.self_attn.o_proj])
    assert stream is held[0].states and output.shape == stream.shape and not calls
    assert not layer.self_attn.o_proj._forward_hooks and not layer.input_layernorm._forward_pre_hooks


def test_states_that_were_replaced_are_let_go():
    _, _, held = held_of("llama")
    gone = weakref.ref(held[0].states)
    held[0].states = torch.zeros(1)
    gc.collect()
    assert gone() is None


def test_no_text_is_refused():
    model = TINY["llama"]()
    with pytest.raises(LeanError, match="no text to calibrate on"):
        hold(Blocks(Anatomy.of(model), lambda batch: outputs(model, batch)), [])
