"""The map agrees with the config, on loaded models, skeletons and edited models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from families import (
    ENCODER_DECODERS,
    FAMILIES_TINY,
    TEXT,
    TINY,
    VOCAB,
    family,
    inputs,
    outputs,
    set_attention,
)
from leanformers.anatomy import FAMILIES, Anatomy, base_of, count_parameters
from leanformers.errors import LeanError

GROUPED = ("llama", "mistral", "qwen3", "gemma3", "phi3")
HEAD_DIM = {"qwen3": 12, "gemma3": 12, "t5": 6, "mt5": 6, "t5-relu": 6}
GATED = (*GROUPED, "llama-ungrouped", "t5", "mt5", "dinov2-swiglu")
WIDTH = {"gpt2": 128, "dinov2-swiglu": 48}


def test_every_entry_has_a_tiny_model() -> None:
    assert {family(name).name for name in FAMILIES_TINY} == {entry.name for entry in FAMILIES}
    types = [name for entry in FAMILIES for name in entry.model_types]
    covered = {getattr(transformers, f"{tiny.config}Config").model_type for tiny in TINY.values()}
    assert covered == set(types)
    assert len(types) == len(set(types))


@pytest.mark.parametrize("name", TINY)
def test_counts_and_shapes(name: str) -> None:
    anatomy = Anatomy.of(TINY[name]())
    assert anatomy.hidden_size == 32
    both = name in ENCODER_DECODERS
    assert {stack: len(layers) for stack, layers in anatomy.stacks.items()} == (
        {"encoder": 3, "decoder": 2} if both else {"decoder" if anatomy.causal else "encoder": 3}
    )
    assert anatomy.num_hidden_layers == len(anatomy.layers) == (5 if both else 3)
    head_dim = HEAD_DIM.get(name, 8)
    for layer in anatomy.layers:
        assert layer.module is anatomy.module(layer.path)
        assert anatomy.stacks[layer.stack][layer.index] is layer
        assert (layer.cross_attention is not None) is (layer.stack == "decoder" and both)
        for part in layer.attentions():
            assert anatomy.attention(part.path) is part
            assert (part.num_attention_heads, part.num_key_value_heads) == (4, 2 if name in GROUPED else 4)
            assert part.head_dim == head_dim
            assert part.query.weight().shape == (4 * head_dim, 32)
            assert part.key.weight().shape == part.value.weight().shape == (part.num_key_value_heads * head_dim, 32)
            assert part.output.weight().shape == (32, 4 * head_dim)
            assert part.causal is (layer.stack == "decoder" and not part.cross)
        feed_forward = layer.feed_forward
        assert anatomy.feed_forward(feed_forward.path) is feed_forward
        width = 48 if name in ("bart", "whisper") and layer.stack == "decoder" else WIDTH.get(name, 64)
        assert feed_forward.intermediate_size == width
        assert feed_forward.up.weight().shape == (width, 32)
        assert feed_forward.down.weight().shape == (32, width)
        assert (feed_forward.gate is not None) is (name in GATED)


@pytest.mark.parametrize("name", TEXT)
def test_embeddings_and_head(name: str) -> None:
    model = TINY[name](head="lm")
    anatomy = Anatomy.of(model)
    assert anatomy.is_text
    assert anatomy.embeddings is model.get_input_embeddings()
    assert anatomy.embeddings.num_embeddings == VOCAB
    assert anatomy.head is model.get_output_embeddings()
    assert anatomy.tied is bool(model.config.tie_word_embeddings)
    assert anatomy.config is model.config


@pytest.mark.parametrize("name", TINY)
def test_parameters_and_config(name: str) -> None:
    model = TINY[name]()
    anatomy = Anatomy.of(model)
    assert anatomy.parameters() == count_parameters(model) == model.num_parameters()
    for stack in anatomy.stacks:
        for field in anatomy.stack_paths(stack).num_layers:
            assert getattr(model.config, field) == len(anatomy.stacks[stack])
    with pytest.raises(LeanError, match="has no stack 'middle'"):
        anatomy.stack_paths("middle")


@pytest.mark.parametrize("name", TINY)
def test_paths_are_the_same_under_every_head(name: str) -> None:
    maps = [Anatomy.of(TINY[name](head=head)) for head in (*TINY[name].heads, "base")]
    encoder_alone = [map_ for map_ in maps if set(map_.stacks) == {"encoder"}]
    for map_ in maps:
        assert map_.base is base_of(map_.model)
        assert all(f"{map_.prefix}{path}" in dict(map_.model.named_modules()) for path in map_.roles)
        other = encoder_alone[0] if map_ in encoder_alone else maps[0]
        assert map_.roles == other.roles
        names = map_.model.state_dict()
        assert all(any(name.startswith(start) for name in names) for start in map_.trunk if "shared" not in start)


@pytest.mark.parametrize("name", TINY)
def test_roles(name: str) -> None:
    anatomy = Anatomy.of(TINY[name]())
    linears = anatomy.linears()
    assert list(linears) == list(anatomy.roles)
    for path, projection in linears.items():
        assert projection.rows is None
        assert projection.module is anatomy.module(path)
        assert anatomy.role(path) == anatomy.roles[path]
    fused = {role for role in anatomy.roles.values() if "+" in role}
    expected: set[str] = {"query+key+value"} if name.startswith("gpt") else set()
    if name == "dinov2-swiglu" and "encoder.layer.0.mlp.weights_in" in anatomy.roles:
        expected = {"gate+up"}  # transformers before 5.23
    assert fused == ({"query+key+value", "gate+up"} if name == "phi3" else expected)
    for layer in anatomy.layers:  # the rows of a fused module are shared out, each once
        for parts in (list(layer.attention.projections())[:3], list(layer.feed_forward.projections())[:-1]):
            if parts[0][1].fused:
                rows = torch.cat([projection.rows for _, projection in parts if projection.rows is not None])
                assert rows.sort().values.tolist() == list(range(linears[parts[0][1].path].out_features))


@pytest.mark.parametrize("name", TINY)
def test_skeleton(name: str) -> None:
    model = TINY[name]()
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    ours, theirs = Anatomy.of(model), Anatomy.of(skeleton)
    assert theirs.roles == ours.roles
    assert theirs.flops(16) == ours.flops(16)
    assert theirs.trunk == ours.trunk
    assert theirs.layers[0].attention.query.weight().device.type == "meta"


@pytest.mark.parametrize("name", TINY)
def test_edited(name: str) -> None:
    """Heads and neurons that differ from layer to layer and low-rank linears are read as they are."""
    from leanformers.surgery import FactoriseLinear, KeepHeads, KeepNeurons, apply

    model = TINY[name]()
    anatomy = Anatomy.of(model)
    first, second = anatomy.layers[:2]
    parameters, flops, length = anatomy.parameters(), anatomy.flops(10), 10
    edits: list[tuple[Any, dict[str, Any]]] = [
        (KeepNeurons(path=first.feed_forward.path, size=20), {"keep": torch.arange(20)}),
        (FactoriseLinear(path=second.attention.output.path, rank=5), {}),
        (FactoriseLinear(path=second.attention.query.path, rank=5), {}),
        (FactoriseLinear(path=first.feed_forward.up.path, rank=3), {}),
    ]
    if not anatomy.family.shared_position_bias:
        for layer, size in ((first, 1), (second, first.attention.num_key_value_heads - 1)):
            keep = {"keep": torch.arange(size)}
            edits.append((KeepHeads(path=layer.attention.path, size=size), keep))
    for edit, tensors in edits:
        cost = edit.cost(Anatomy.of(model))
        apply(model, edit, **tensors)
        parameters, flops = parameters + cost.parameters, flops + cost.flops(length)
    again = Anatomy.of(model)
    assert again.layers[0].feed_forward.intermediate_size == 20
    if not anatomy.family.shared_position_bias:
        counts = [layer.attention.num_key_value_heads for layer in again.layers[:3]]
        assert counts == [1, counts[2] - 1, counts[2]]
    assert list(again.roles) == list(anatomy.roles)
    assert again.parameters() == parameters
    assert again.flops(length) == flops
    assert torch.isfinite(outputs(model, inputs(model))).all()
    if name in TEXT:
        from torch.utils.flop_counter import FlopCounterMode

        set_attention(model, "eager")
        with FlopCounterMode(display=False) as counter:
            outputs(model, inputs(model, 1, length))
        counts_by = counter.get_flop_counts()
        rotary = sum(sum(ops.values()) for part, ops in counts_by.items() if part.endswith("rotary_emb"))
        assert counter.get_total_flops() - rotary == flops


@pytest.mark.parametrize("name", [name for name in TINY if not family(name).shared_position_bias])
def test_stock_heads(name: str) -> None:
    """What the entry says of head counts is what a stock config can hold, by building one."""
    from leanformers.surgery import KeepHeads, apply, tier

    anatomy = Anatomy.of(TINY[name]())
    groups = anatomy.layers[0].attention.num_key_value_heads
    for size in (groups - 1, groups // 2):
        model = TINY[name]()
        for layer in Anatomy.of(model).layers:
            for part in layer.attentions():
                apply(model, KeepHeads(path=part.path, size=size), keep=torch.arange(size))
        heads = Anatomy.of(model).layers[0].attention.num_attention_heads
        stock = {"fixed_head_dim": True, "divides": 32 % heads == 0, "never": False}[family(name).stock_heads]
        if name.startswith("dinov2") and anatomy.layers[0].attention.path.endswith("attention.attention"):
            stock = False  # transformers before 5.23
        assert tier(model) == ("stock" if stock else "lean")


def test_unknown_family() -> None:
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=VOCAB)
    with pytest.raises(LeanError, match=r"'bloom' \(BloomModel\).*gpt2.*add an entry") as error:
        Anatomy.of(transformers.BloomModel(config))
    assert "\n" not in str(error.value)


def test_no_transformer() -> None:
    with pytest.raises(LeanError, match=r"no config\.model_type"):
        Anatomy.of(nn.Linear(2, 2))


def test_a_part_out_of_place() -> None:
    model = TINY["bert"]()
    del model.bert.encoder.layer[1].intermediate.dense
    with pytest.raises(LeanError, match=r"encoder\.layer\.1 is not where the entry 'bert'"):
        Anatomy.of(model)
    model.bert.encoder.layer = nn.ModuleList()
    with pytest.raises(LeanError, match="no layers"):
        Anatomy.of(model)


def test_wrong_paths() -> None:
    anatomy = Anatomy.of(TINY["bert"]())
    with pytest.raises(LeanError, match=r"bert\.encoder"):
        anatomy.module("bert.encoder")
    for look in (anatomy.attention, anatomy.feed_forward, anatomy.role):
        with pytest.raises(LeanError, match="'elsewhere'"):
            look("elsewhere")


def test_norms() -> None:
    gemma = Anatomy.of(TINY["gemma3"]())
    assert [norm.place for norm in gemma.layers[0].norms] == ["pre", "output", "pre", "output"]
    torch.testing.assert_close(gemma.residual.gain(gemma.final_norms[0]), 1 + gemma.base.norm.weight)
    stable, plain = (Anatomy.of(TINY[name]()) for name in ("wav2vec2-stable", "wav2vec2"))
    assert [len(anatomy.final_norms) for anatomy in (stable, plain)] == [1, 0]
    assert next(norm.place for norm in plain.norms) == "embedding"
    dinov2 = Anatomy.of(TINY["dinov2"]())
    scale = dinov2.layers[0].norm("scale", "attention")
    assert scale is not None
    assert dinov2.residual.gain(scale) is scale.module.lambda1


def test_base_of() -> None:
    model = TINY["bert"]()
    assert base_of(model) is model.bert
    assert base_of(model.bert) is model.bert
    assert base_of(SimpleNamespace()) is not None  # type: ignore[arg-type]
