"""Dropped sub-layers and exchanged attention: what a mistake would break in silence."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from families import ENCODER_DECODERS, TINY, inputs, outputs, set_attention
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.surgery import (
    DropLayers,
    DropSublayers,
    FactoriseLinear,
    KeepHeads,
    KeepNeurons,
    QuantiseLinear,
    SliceResidual,
    SwapAttention,
    apply,
    tier,
)

DECODERS = ("gpt2", "gpt-neox", "opt", "llama", "qwen3", "gemma3", "phi3", "t5", "bart", "whisper")
MIXED = [name for name in TINY if not name.startswith(("mpnet", "deberta"))]


def without(model, *places):
    """Drop sub-layers by (index of the layer among all, name)."""
    for index, name in places:
        apply(model, DropSublayers(path=Anatomy.of(model).layers[index].path, sublayers=(name,)))
    return model


def hard(model, k, keep=lambda attention: True):
    for layer in Anatomy.of(model).layers:
        for attention in layer.attentions():
            if keep(attention):
                apply(model, SwapAttention(path=attention.path, mixer="top_k", settings={"k": k}))
    return model


# -- dropped sub-layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("name", ["attention", "cross_attention", "feed_forward"])
def test_a_branch_that_is_gone_adds_nothing(family, name):
    whole = TINY[family]()
    anatomy = Anatomy.of(whole)
    index = 0 if name != "cross_attention" else len(anatomy.layers) - 1
    layer = anatomy.layers[index]
    part = layer.sublayers().get(name)
    if part is None:
        pytest.skip("the layer has no such branch")
    last = part.down if name == "feed_forward" else part.output
    ends = [last.module, *(n.module for n in layer.norms if n.reads == name and n.place in ("output", "scale"))]
    for end in ends:
        end.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    small = without(TINY[family](), (index, name))
    after = Anatomy.of(small)
    assert getattr(after.layers[index], name).absent and name not in after.layers[index].sublayers()
    stays = {(norm.path, norm.place) for norm in after.norms}
    assert {(n.path, n.place) for n in anatomy.norms} - stays == {
        (n.path, n.place) for n in layer.norms if n.reads == name and n.place != "post"
    }
    batch = inputs(small, padded=True)
    torch.testing.assert_close(outputs(small, batch), outputs(whole, batch), rtol=1e-5, atol=1e-5)
    assert after.hidden_size == 32 and not any(layer.path + "." + name in path for path in after.roles)


@pytest.mark.parametrize("family", DECODERS)
def test_the_cache_counts_tokens_where_the_first_attention_is_gone(family):
    model = TINY[family]()
    stack = [i for i, layer in enumerate(Anatomy.of(model).layers) if layer.stack == "decoder"]
    without(model, (stack[0], "attention"))
    batch = inputs(model)
    if family in ENCODER_DECODERS:
        batch.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    ids = torch.arange(5, 13)[None]
    if family not in ENCODER_DECODERS:  # the second half after the first, through the cache
        first = model(ids[:, :4], use_cache=True)
        assert first.past_key_values.get_seq_length() == 4
        second = model(ids[:, 4:], past_key_values=first.past_key_values)
        torch.testing.assert_close(second.logits, model(ids).logits[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["t5", "mt5"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_the_position_bias_of_a_stack_outlives_its_first_attention(family, stack, tmp_path):
    model = TINY[family]()
    layers = Anatomy.of(model).stacks[stack]
    bias = layers[0].attention.module.relative_attention_bias
    apply(model, DropSublayers(path=layers[0].path, sublayers=("attention",)))
    held = [getattr(one.attention.module, "relative_attention_bias", None) for one in Anatomy.of(model).stacks[stack]]
    assert held[0] is None and held[1] is bias
    apply(model, DropLayers(stack=stack, keep=tuple(range(len(layers)))[1:]))
    assert Anatomy.of(model).stacks[stack][0].attention.module.relative_attention_bias is bias
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    batch = inputs(model, padded=True)
    assert torch.equal(outputs(again, batch), outputs(model, batch))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "phi3", "vit", "t5", "bart", "deberta-v2"])
def test_other_edits_go_around_what_is_gone(family, tmp_path):
    model = without(TINY[family](), (0, "attention"), (0, "feed_forward"), (1, "feed_forward"))
    anatomy = Anatomy.of(model)
    layer = anatomy.layers[1]
    if not anatomy.family.shared_position_bias:
        apply(model, KeepHeads(path=layer.attention.path, size=1), keep=torch.tensor([1]))
    apply(model, KeepNeurons(path=anatomy.layers[2].feed_forward.path, size=8), keep=torch.arange(8))
    apply(model, SliceResidual(size=24), keep=torch.arange(24))
    apply(model, FactoriseLinear(path=layer.attention.output.path, rank=2))
    apply(model, QuantiseLinear(path=Anatomy.of(model).layers[2].feed_forward.down.path))
    assert tier(model) == "lean" and Anatomy.of(model).hidden_size == 24
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    batch = inputs(model, padded=True)
    assert outputs(model, batch).isfinite().all()
    assert torch.equal(outputs(again, batch), outputs(model, batch))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            DropSublayers(path="encoder.layer.0", sublayers=("attention",)),
            "no 'attention' to drop: it has feed_forward",
        ),
        (DropSublayers(path="encoder.layer.0", sublayers=("mlp",)), "no 'mlp' to drop"),
        (DropSublayers(path="encoder.layer.9", sublayers=("attention",)), "No layer at 'encoder.layer.9'"),
        (DropSublayers(path="encoder.layer.1", sublayers=()), "name each of"),
        (KeepHeads(path="encoder.layer.0.attention.self", size=1), "was dropped"),
        (KeepNeurons(path="encoder.layer.2", size=1), "was dropped"),
        (SwapAttention(path="encoder.layer.0.attention.self", mixer="top_k", settings={"k": 1}), "was dropped"),
        (SwapAttention(path="encoder.layer.1.attention.self", mixer="none"), "no mixer 'none'.*top_k"),
        (SwapAttention(path="encoder.layer.1.attention.self", mixer="top_k", settings={"k": 0}), "k is 0"),
        (SwapAttention(path="encoder.layer.1.attention.self", mixer="top_k", settings={"n": 3}), "does not take"),
        (FactoriseLinear(path="encoder.layer.2.output.dense", rank=1), "already dropped"),
        (QuantiseLinear(path="encoder.layer.2.output.dense"), "AbsentLinear, which cannot be quantised"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(edit, words):
    model = without(TINY["bert"](), (0, "attention"), (2, "feed_forward"))
    before = model.state_dict()
    with pytest.raises(LeanError, match=words) as caught:
        apply(model, edit)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_last_sublayer_stays():
    model = without(TINY["bert"](), *((index, name) for index in (0, 1) for name in ("attention", "feed_forward")))
    path = Anatomy.of(model).layers[2].path
    with pytest.raises(LeanError, match="the last sub-layer"):
        apply(model, DropSublayers(path=path, sublayers=("attention", "feed_forward")))
    apply(model, DropSublayers(path=path, sublayers=("attention",)))
    with pytest.raises(LeanError, match="the last sub-layer"):
        apply(model, DropSublayers(path=path, sublayers=("feed_forward",)))


def test_gradients_pass_by():
    model = without(TINY["llama"](), (1, "attention"), (1, "feed_forward")).train()
    batch = inputs(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["bert", "llama", "vit", "t5"])
def test_half_precision_stays_half(family):
    model = without(TINY[family]().to(torch.bfloat16), (0, "attention"), (1, "feed_forward"))
    batch = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs(model).items()}
    assert outputs(model, batch).dtype == torch.bfloat16


# -- top-k attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXED)
def test_as_many_keys_as_there_are_change_nothing_and_fewer_do(family):
    whole, same, few = TINY[family](), hard(TINY[family](), 64), hard(TINY[family](), 2)
    batch = inputs(whole, padded=True)
    expected = outputs(whole, batch)
    torch.testing.assert_close(outputs(same, batch), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs(few, batch), expected, atol=1e-2)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma3", "t5"])
def test_top_k_against_a_plain_reference(family):
    """Probabilities by the model's own eager attention, cut and not normalised again, times the values."""
    model = TINY[family]()
    attention = next(Anatomy.of(model).layers[0].attentions())
    set_attention(model, "eager")
    seen = {}
    attention.value.module.register_forward_hook(lambda m, a, o: seen.update(value=o))
    attention.output.module.register_forward_pre_hook(lambda m, a: seen.update(context=a[0]))
    batch = inputs(model, padded=True)
    with torch.no_grad():
        found = model(**batch, output_attentions=True)
    probabilities = (found.encoder_attentions if family == "t5" else found.attentions)[0]  # [batch, heads, T, T]
    value = seen["value"] if attention.value.rows is None else seen["value"][..., attention.value.rows]
    value = value.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    value = value.repeat_interleave(probabilities.shape[1] // value.shape[1], dim=1)
    torch.testing.assert_close(
        (probabilities @ value).transpose(1, 2).flatten(2), seen["context"], rtol=1e-4, atol=1e-4
    )
    kept = torch.zeros_like(probabilities)
    top = probabilities.topk(3, dim=-1)
    kept.scatter_(-1, top.indices, top.values)
    expected = (kept @ value).transpose(1, 2).flatten(2)
    set_attention(model, "sdpa")
    apply(model, SwapAttention(path=attention.path, mixer="top_k", settings={"k": 3}))
    outputs(model, batch)
    real = (
        torch.ones(expected.shape[:2], dtype=torch.bool)
        if "attention_mask" not in batch
        else batch["attention_mask"].bool()
    )
    torch.testing.assert_close(seen["context"][real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama", "gemma3", "t5", "bart"])
def test_padding_never_enters(family):
    model = hard(TINY[family](head="lm"), 3)
    padded = inputs(model, padded=True)
    short = int(padded["attention_mask"][1].sum())
    alone = {"input_ids": padded["input_ids"][1:, :short]}
    if "decoder_input_ids" in padded:
        alone["decoder_input_ids"] = padded["decoder_input_ids"][1:]
    found = outputs(model, padded)[1:]
    found = found if "decoder_input_ids" in padded else found[:, :short]
    torch.testing.assert_close(found, outputs(model, alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_no_later_token_is_seen_and_the_cache_agrees(family):
    model = hard(TINY[family](), 2)
    batch = inputs(model)
    field = "decoder_input_ids" if family in ENCODER_DECODERS else "input_ids"
    other = {**batch, field: batch[field].clone()}
    other[field][:, 5:] = 9
    torch.testing.assert_close(outputs(model, batch)[:, :5], outputs(model, other)[:, :5])
    batch.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


def test_long_sequences_go_in_parts(monkeypatch):
    from leanformers.parts import top_k

    for family in ("bert", "llama", "t5"):
        model = hard(TINY[family](), 3)
        batch = inputs(model, padded=True)
        whole = outputs(model, batch)
        monkeypatch.setattr(top_k, "_ROWS", 2)
        torch.testing.assert_close(outputs(model, batch), whole)
        monkeypatch.undo()


def test_another_attention_function_does_not_pass_over_the_mixer(tmp_path):
    model = hard(TINY["bert"](), 2)
    batch = inputs(model)
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path)
    for choice in ("sdpa", "eager", None):
        again = type(model).from_pretrained(tmp_path, attn_implementation=choice).eval()
        assert torch.equal(outputs(again, batch), expected)
    assert torch.equal(outputs(copy.deepcopy(model), batch), expected)
    model.set_attn_implementation("sdpa")
    with pytest.raises(LeanError, match=r"set_attn_implementation\('leanformers'\)"):
        outputs(model, batch)
    model.set_attn_implementation("leanformers")
    assert torch.equal(outputs(model, batch), expected)


def test_a_second_mixer_takes_the_place_of_the_first():
    model = hard(hard(TINY["bert"](), 2), 5)
    module: nn.Module = Anatomy.of(model).layers[0].attention.module
    assert module.mixer.k == 5 and len(module._forward_pre_hooks) == 1
    batch = inputs(model)
    assert torch.equal(outputs(model, batch), outputs(hard(TINY["bert"](), 5), batch))
