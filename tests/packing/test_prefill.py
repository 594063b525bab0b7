"""Packed prompts: every prompt's cache is what it is alone, in the order of arrival, and nothing leaks."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
import transformers as T

import leanformers as lean
from families import TINY
from leanformers.errors import LeanError
from leanformers.packing import first_fit_decreasing, prefilling
from leanformers.packing.prefilling import Prefiller
from leanformers.surgery import DropLayers, DropSublayers, FactoriseLinear, KeepHeads, QuantiseLinear, SwapAttention
from leanformers.surgery import apply as edit

DECODERS = (
    "gpt2",
    "gpt-neox",
    "opt",
    "opt-post-norm",
    "llama",
    "llama-ungrouped",
    "mistral",
    "qwen3",
    "gemma3",
    "phi3",
)
LENGTHS = (3, 1, 9, 4, 7, 1, 2)
GREEDY = {"do_sample": False, "pad_token_id": 0}


def prompts_of(lengths=LENGTHS, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 96, (length,), generator=random).tolist() for length in lengths]


def lengths_for(name):
    return (3, 1, 4, 2) if name == "gemma3" else LENGTHS  # whose tiny window is 4


def spans(cache, prompts):
    """Keys and values of each prompt, layer by layer, and what stands before them."""
    for i, prompt in enumerate(prompts):
        count = len(prompt) - 1
        for layer in cache.layers:
            for states in (layer.keys, layer.values):
                yield i, states[i, :, states.shape[2] - count :], states[i, :, : states.shape[2] - count]


def assert_as_alone(model, prompts, found, tolerance=1e-5):
    own = {}
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            alone = model(torch.tensor([prompt[:-1] or [0]]), use_cache=True).past_key_values
        own[i] = iter([states[0] for layer in alone.layers for states in (layer.keys, layer.values)])
    for i, states, before in spans(found, prompts):
        expected = next(own[i])
        if states.shape[1]:
            torch.testing.assert_close(states, expected, rtol=0, atol=tolerance)
        assert not before.any()


def decoded_alone(model, prompts, count):
    options = {"max_new_tokens": count, "min_new_tokens": count, **GREEDY}
    return [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]


def decoded(model, prefilled, count):
    return model.generate(**prefilled, max_new_tokens=count, min_new_tokens=count, **GREEDY)[:, -count:].tolist()


@pytest.mark.parametrize("path", prefilling.PATHS)
@pytest.mark.parametrize("name", DECODERS)
def test_the_cache_of_a_prompt_is_what_it_is_alone(name, path):
    model, prompts = TINY[name](), prompts_of(lengths_for(name))
    before = model.config._attn_implementation
    found = lean.prefill(model, prompts, path=path)
    assert_as_alone(model, prompts, found.past_key_values)
    assert found.path == path and model.config._attn_implementation == before
    assert found.last_tokens[:, 0].tolist() == [prompt[-1] for prompt in prompts]


@pytest.mark.parametrize("name", DECODERS)
def test_twenty_greedy_tokens_are_those_of_each_prompt_alone(name):
    model, prompts = TINY[name](), prompts_of(lengths_for(name))
    assert decoded(model, lean.prefill(model, prompts), 20) == decoded_alone(model, prompts, 20)


@pytest.mark.parametrize("path", prefilling.PATHS)
def test_the_order_of_arrival_stays(path):
    model, prompts = TINY["llama"](), prompts_of()
    straight = lean.prefill(model, prompts, path=path)
    order = torch.randperm(len(prompts)).tolist()
    mixed = lean.prefill(model, [prompts[i] for i in order], path=path)
    for one, two in zip(straight.past_key_values.layers, mixed.past_key_values.layers, strict=True):
        torch.testing.assert_close(two.keys, one.keys[order], rtol=0, atol=1e-5)
    assert torch.equal(mixed.input_ids, straight.input_ids[order])
    assert torch.equal(mixed.attention_mask, straight.attention_mask[order])


@pytest.mark.parametrize("path", prefilling.PATHS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_nothing_leaks_from_one_prompt_into_another(name, path):
    model, prompts = TINY[name](), prompts_of()
    before = lean.prefill(model, prompts, path=path).past_key_values
    prompts[2] = prompts_of(seed=1)[2]
    after = lean.prefill(model, prompts, path=path).past_key_values
    others = [i for i in range(len(prompts)) if i != 2]
    for one, two in zip(before.layers, after.layers, strict=True):
        assert torch.equal(one.keys[others], two.keys[others]) and torch.equal(one.values[others], two.values[others])
        assert not torch.equal(one.keys[2], two.keys[2])


@pytest.mark.parametrize("lengths", [(6,), (5, 5, 5), (2, 2), (1, 1, 1), (1,)])
def test_one_prompt_equal_ones_and_those_of_one_token(lengths):
    model, prompts = TINY["llama"](), prompts_of(lengths)
    found = lean.prefill(model, prompts)
    assert found.past_key_values.get_seq_length() == max(lengths) - 1
    assert decoded(model, found, 5) == decoded_alone(model, prompts, 5)


def test_a_padded_tensor_is_read_whatever_its_side():
    model, prompts = TINY["llama"](), prompts_of()
    listed = lean.prefill(model, prompts)
    width = max(map(len, prompts)) + 2
    for left in (True, False):
        ids, mask = torch.full((2, len(prompts), width), 0)
        for i, prompt in enumerate(prompts):
            span = slice(width - len(prompt), width) if left else slice(0, len(prompt))
            ids[i, span], mask[i, span] = torch.tensor(prompt), 1
        found = lean.prefill(model, ids, mask)
        assert torch.equal(found.input_ids, listed.input_ids)
        assert torch.equal(found.past_key_values.layers[1].keys, listed.past_key_values.layers[1].keys)


@pytest.mark.parametrize("most", [8, 12, 1000])
def test_bins_bound_the_rows_and_change_nothing(most, monkeypatch):
    model, prompts = TINY["llama"](), prompts_of()
    monkeypatch.setattr(prefilling, "MOST_TOKENS_CPU", most)
    prefiller, seen = Prefiller(model), []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    found = prefiller(prompts)
    hook.remove()
    assert_as_alone(model, prompts, found.past_key_values)
    assert max(seen) <= most and sum(seen) == sum(len(prompt) - 1 for prompt in prompts)


@pytest.mark.parametrize("seed", range(6))
def test_the_packer_holds_its_bound(seed):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 11, (7,), generator=random).tolist()
    bins = first_fit_decreasing(lengths, 10)
    assert sorted(i for held in bins for i in held) == [i for i, length in enumerate(lengths) if length]
    assert all(held and sum(lengths[i] for i in held) <= 10 for held in bins)
    assert len(bins) <= 11 / 9 * fewest(lengths, 10) + 1


def fewest(lengths, capacity):
    """Of all ways to share them out."""
    items = [length for length in lengths if length]
    for count in range(len(items) + 1):
        for chosen in product(range(count), repeat=len(items)):
            sums = [sum(size for size, into in zip(items, chosen, strict=True) if into == one) for one in range(count)]
            if all(total <= capacity for total in sums):
                return count
    raise AssertionError


def kept_heads(model, layers):
    edit(model, KeepHeads(path=layers[0].attention.path, size=1), keep=torch.tensor([1]))


def dropped(model, layers):
    edit(model, DropSublayers(path=layers[0].path, sublayers=("attention",)))
    edit(model, DropSublayers(path=layers[2].path, sublayers=("attention", "feed_forward")))


def fewer_layers(model, layers):
    edit(model, DropLayers(keep=(0, 2)))


def factorised(model, layers):
    edit(model, FactoriseLinear(path=layers[1].feed_forward.down.path, rank=4))


def quantised(model, layers):
    for path in lean.Anatomy.of(model).paths(("query", "key", "value", "down")):
        edit(model, QuantiseLinear(path=path, scheme="int8_weight_only"))


@pytest.mark.parametrize("slim", [kept_heads, dropped, fewer_layers, factorised, quantised])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_slimmed_models_too(name, slim):
    model, prompts = TINY[name](), prompts_of()
    slim(model, lean.Anatomy.of(model).layers)
    found = lean.prefill(model, prompts)
    assert_as_alone(model, prompts, found.past_key_values)
    assert decoded(model, found, 8) == decoded_alone(model, prompts, 8)


def test_no_logits_are_computed():
    model, prompts = TINY["llama"](), prompts_of()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head was called"))
    lean.prefill(model, prompts)


def test_the_attention_is_put_back_after_an_error():
    model = TINY["llama"]()
    model.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lean.prefill(model, prompts_of())
    assert model.config._attn_implementation == "sdpa"


def test_it_compiles_without_a_break(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, prompts = TINY["llama"](num_hidden_layers=1), prompts_of()
    assert_as_alone(model, prompts, Prefiller(model, compile=True)(prompts).past_key_values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs are replayed on a GPU")
def test_graphs_are_replayed_and_give_the_same():
    model = TINY["llama"](hidden_size=64, num_hidden_layers=2).cuda()
    prefiller = Prefiller(model, graphs=True)
    for seed in range(3):
        prompts = prompts_of(seed=seed)
        found, plain = prefiller(prompts).past_key_values, lean.prefill(model, prompts).past_key_values
        for one, two in zip(found.layers, plain.layers, strict=True):
            torch.testing.assert_close(one.keys, two.keys, rtol=0, atol=1e-5)
            torch.testing.assert_close(one.values, two.values, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- refusals
def test_a_window_that_would_be_left_is_refused():
    model = TINY["mistral"](sliding_window=6)
    within = prompts_of((3, 6, 5))
    found = lean.prefill(model, within)
    assert_as_alone(model, within, found.past_key_values)
    assert decoded(model, found, 8) == decoded_alone(model, within, 8)
    with pytest.raises(LeanError, match="looks back 6 tokens and the longest prompt has 7"):
        lean.prefill(model, prompts_of((3, 7)))
    with pytest.raises(LeanError, match="looks back 4 tokens"):
        lean.prefill(TINY["gemma3"](), prompts_of((3, 7)))


def test_a_cache_with_windows_is_transformers_own():
    model = TINY["gemma3"]()
    layers = lean.prefill(model, prompts_of((3, 4))).past_key_values.layers
    assert [type(layer).__name__ for layer in layers] == [
        "DynamicSlidingWindowLayer",
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bert", "is not causal and has no prompts"),
        ("t5", "no decoder alone"),
        ("bart", "no decoder alone"),
        ("vit", "no decoder alone"),
    ],
)
def test_models_without_prompts_are_refused(name, words):
    with pytest.raises(LeanError, match=words) as caught:
        lean.prefill(TINY[name](), prompts_of())
    assert "\n" not in str(caught.value)


def test_unknown_families_and_mixers_are_refused_by_name():
    mamba = T.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=96, state_size=4)
    with pytest.raises(LeanError, match="'mamba'"):
        lean.prefill(T.MambaForCausalLM(mamba).eval(), prompts_of())
    model = TINY["llama"]()
    for layer in lean.Anatomy.of(model).layers:
        edit(model, SwapAttention(path=layer.attention.path, mixer="top_k", settings={"k": 4}))
    with pytest.raises(LeanError, match=r"holds a mixer at .*which packed attention does not know"):
        lean.prefill(model, prompts_of())


def test_bad_prompts_are_refused_in_one_sentence():
    model = TINY["llama"]()
    with pytest.raises(LeanError, match="no prompt to prefill"):
        lean.prefill(model, [])
    with pytest.raises(LeanError, match="token ids, not texts"):
        lean.prefill(model, ["a text", "another"])
    with pytest.raises(LeanError, match="Prompt 1 has no tokens"):
        lean.prefill(model, [[5], []])
    with pytest.raises(LeanError, match="has 65 tokens, and LlamaForCausalLM takes 64"):
        lean.prefill(model, prompts_of((65,)))
    with pytest.raises(LeanError, match=r"shape \[2\], input_ids \[1, 2\]"):
        lean.prefill(model, torch.tensor([[4, 5]]), torch.tensor([1, 1]))
    with pytest.raises(LeanError, match="leave it out for lists"):
        lean.prefill(model, [[4, 5]], torch.tensor([[1, 1]]))
    with pytest.raises(LeanError, match="no path 'fast'"):
        lean.prefill(model, [[4, 5]], path="fast")
    with pytest.raises(LeanError, match=r"call model\.eval"):
        lean.prefill(TINY["llama"]().train(), [[4, 5]])


def test_positions_that_depend_on_the_longest_prompt_are_refused_where_they_do():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 8}
    model = TINY["llama"](rope_parameters=rope)
    assert len(lean.prefill(model, prompts_of((3, 8))).input_ids) == 2
    with pytest.raises(LeanError, match="beyond 8 tokens"):
        lean.prefill(model, prompts_of((3, 9)))
