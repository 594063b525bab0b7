"""LazyLLM: the identities of its cache, the method, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as T
from subjects import decoder, encoder, outputs

import leanformers as lean
from families import FAMILIES_TINY, TINY
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.lazy import LazyCache
from leanformers.lazy.cache import _names
from leanformers.methods import Saving, get
from leanformers.surgery import DropLayers, DropSublayers, KeepHeads, PrunePrompt, SwapAttention, ledger, tier
from leanformers.surgery import apply as edit

CAUSAL = ("gpt2", "gpt-neox", "gpt-neox-sequential", "opt", "opt-post-norm", "llama", "mistral", "qwen3", "phi3")
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
RATES = {1: 0.4, 2: 0.3, 3: 0.5}
LAYERS = 5


def tiny(family: str = "llama", layers: int = LAYERS, **fields):
    name = {"gpt2": "n_layer"}.get(family, "num_hidden_layers")
    return TINY[family](**{name: layers}, **fields)


def pruned(family: str = "llama", rates: dict[int, float] = RATES, **fields):
    model = tiny(family, **fields)
    paths = [layer.path for layer in Anatomy.of(model).layers]
    for layer, rate in rates.items():
        edit(model, PrunePrompt(path=paths[layer], rate=rate))
    return model


def prompt(length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(5, 90, (1, length), generator=torch.Generator().manual_seed(seed))


def modules(model):
    return [layer.module for layer in Anatomy.of(model).layers]


@torch.no_grad()
def walked(model, cache, steps):
    """The logits of the last token after each step, and of every (step, layer) the positions run and seen."""
    runs, handles = [], []
    for index, module in enumerate(modules(model)):

        def note(*_, index=index):
            runs.append((index, cache.step.running.tolist(), cache.step.visible.tolist()))

        handles.append(module.register_forward_pre_hook(note))
    logits = [model(ids, past_key_values=cache).logits[0, -1] for ids in steps]
    for handle in handles:
        handle.remove()
    return logits, runs


def steps(prompt_length: int = 24, new: int = 8) -> list[torch.Tensor]:
    """A prompt, single tokens, and a second prompt behind them."""
    drawn = prompt(prompt_length + new + 5)
    parts = [drawn[:, :prompt_length], *drawn[:, prompt_length:-5].split(1, dim=1), drawn[:, -5:]]
    return [part for part in parts if part.shape[1]]


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_without_rates_it_is_the_dense_model(family):
    model, dense, ids = pruned(family), tiny(family), prompt()
    cache = LazyCache(model, {})
    expected = dense(ids, use_cache=True)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected.logits, rtol=1e-4, atol=1e-4)
    for rows, layer in zip(cache.kv, expected.past_key_values.layers, strict=True):
        for found, wanted in zip(rows.get(torch.arange(24)), (layer.keys, layer.values), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    written = model.generate(ids, past_key_values=LazyCache(model, {}), max_new_tokens=20, **GREEDY)
    assert torch.equal(written, dense.generate(ids, max_new_tokens=20, **GREEDY))


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_a_whole_generation_is_one_dense_pass_that_hides_what_was_dropped(family):
    """Every (token, layer) is computed at most once, so a pass over all tokens with one mask per layer must agree:
    dropped tokens count for nothing, positions are the original ones, and waiting states enter the right layer."""
    model, dense, parts = pruned(family), tiny(family), steps()
    dense.set_attn_implementation("sdpa")
    found, runs = walked(model, LazyCache(model), parts)
    length = sum(part.shape[1] for part in parts)
    seen = torch.eye(length, dtype=torch.bool).repeat(LAYERS, 1, 1)
    for layer, running, visible in runs:
        for token in running:
            seen[layer, token] = False
            seen[layer, token, [other for other in visible if other <= token]] = True
    assert not seen[-1, -1].all()
    for layer, module in enumerate(modules(dense)):

        def masked(module, args, kwargs, layer=layer):
            given = {**dict(zip(_names(type(module).forward), args, strict=False)), **kwargs}
            return (given.pop("hidden_states"),), {**given, "attention_mask": seen[layer][None, None]}

        module.register_forward_pre_hook(masked, with_kwargs=True)
    logits = dense(torch.cat(parts, 1)).logits[0]
    ends = torch.tensor([part.shape[1] for part in parts]).cumsum(0) - 1
    torch.testing.assert_close(torch.stack(found), logits[ends], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
def test_no_token_passes_a_layer_twice(family):
    model = pruned(family)
    cache = LazyCache(model)
    _, runs = walked(model, cache, steps())
    computed = [(layer, token) for layer, running, _ in runs for token in running]
    assert len(computed) == len(set(computed)) == sum(rows.count for rows in cache.kv)
    assert cache.computed() < 1


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_what_is_known_of_a_token_is_a_prefix_of_the_layers(family):
    model, revived = pruned(family), False
    cache = LazyCache(model)
    before = torch.zeros(0, dtype=torch.int64)
    for ids in steps():
        model(ids, past_key_values=cache)
        depth, everyone = cache.depth(), torch.arange(cache.length)
        for layer in range(LAYERS):
            assert torch.equal(cache.kv[layer].has(everyone), depth > layer)
            waits = cache.waiting[layer].has(everyone)
            assert torch.equal(waits, depth == layer) if layer else not waits.any()
        assert (depth[: len(before)] >= before).all()
        revived = revived or bool((depth[: len(before)] > before).any())
        before = depth
    assert revived and (before < LAYERS).any()


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_a_step_that_sees_all_finishes_every_token(family):
    model = pruned(family)
    cache = LazyCache(model)
    for ids in steps():
        model(ids, past_key_values=cache)
    assert (cache.depth() < LAYERS).any()
    cache.rates = {}
    model(prompt(1), past_key_values=cache)
    assert (cache.depth() == LAYERS).all() and not any(rows.count for rows in cache.waiting)
    assert cache.computed() == 1 and cache.memory()["waiting"] == 0


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_pruning_after_the_last_layer_changes_nothing(family):
    model, dense = pruned(family, {LAYERS - 1: 0.9}), tiny(family)
    logits = model(prompt(), past_key_values=LazyCache(model)).logits
    torch.testing.assert_close(logits, dense(prompt()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_earlier_tokens_do_not_depend_on_the_last_one_before_the_first_pruning(family):
    model, ids = pruned(family), prompt()
    other = ids.clone()
    other[0, -1] = 3
    caches = [LazyCache(model), LazyCache(model)]
    for tokens, cache in zip((ids, other), caches, strict=True):
        model(tokens, past_key_values=cache)
    for layer in range(2):  # layer 1 is the first to prune, and its own keys and values are of all tokens
        for one, two in zip(*(cache.kv[layer].get(torch.arange(23)) for cache in caches), strict=True):
            torch.testing.assert_close(one, two)
    assert caches[0].kv[2].positions.tolist() != caches[1].kv[2].positions.tolist()


@torch.no_grad()
def test_the_score_is_the_attention_of_the_last_token():
    seen = {}

    class Noting(LazyCache):
        def keep(self, layer, scores, visible):
            seen.setdefault(layer, scores)
            return super().keep(layer, scores, visible)

    model, dense = pruned("qwen3"), tiny("qwen3")
    dense.set_attn_implementation("eager")
    model(prompt(), past_key_values=Noting(model))
    expected = dense(prompt(), output_attentions=True).attentions[1][0, :, -1].mean(0)
    torch.testing.assert_close(seen[1], expected, rtol=1e-4, atol=1e-6)
    assert [len(seen[layer]) for layer in sorted(seen)] == [24, 24 - int(0.4 * 24), 15 - int(0.3 * 15)]


@torch.no_grad()
def test_dropped_tokens_have_no_logits_and_the_ends_stay():
    model = pruned(rates={1: 0.99, 2: 0.99})
    cache = LazyCache(model)
    logits = model(prompt(), past_key_values=cache).logits[0]
    assert logits[[0, -1]].isfinite().all() and logits[1:-1].isnan().all()
    assert cache.kv[-1].positions.tolist() == [0, 23]
    assert model(prompt(1), past_key_values=LazyCache(model)).logits.isfinite().all()  # a prompt of one token


def test_what_it_writes_is_of_its_seed_and_a_copy_writes_the_same():
    model, stock = pruned(), tiny()
    options = {"max_new_tokens": 12, "do_sample": True, "pad_token_id": 0, "eos_token_id": None}
    drawn = []
    for one in (model, model, copy.deepcopy(model)):
        torch.manual_seed(3)
        drawn.append(one.generate(prompt(), **options))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    torch.manual_seed(3)
    dense = stock.generate(prompt(), **options)
    torch.manual_seed(3)
    assert torch.equal(model.generate(prompt(), past_key_values=LazyCache(model, {}), **options), dense)
    greedy = model.generate(prompt(), max_new_tokens=12, **GREEDY)
    assert torch.equal(
        greedy, model.generate(attention_mask=torch.ones(1, 24), input_ids=prompt(), max_new_tokens=12, **GREEDY)
    )
    assert not torch.equal(greedy, stock.generate(prompt(), max_new_tokens=12, **GREEDY))


@pytest.mark.parametrize("family", CAUSAL)
def test_a_saved_folder_prunes_again(family, tmp_path):
    model = pruned(family)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert tier(again) == "lean" and ledger(again) == ledger(model) and LazyCache(again).rates == RATES
    options = {"max_new_tokens": 12, **GREEDY}
    assert torch.equal(again.generate(prompt(), **options), model.generate(prompt(), **options))
    base = T.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        states = base(prompt(), past_key_values=LazyCache(base)).last_hidden_state
    assert states.shape[1] == 24 and states[0, -1].isfinite().all() and states.isnan().any()


def test_it_composes_with_other_edits():
    model = pruned()
    layers = Anatomy.of(model).layers
    edit(model, SwapAttention(path=layers[2].attention.path, mixer="top_k", settings={"k": 4}))
    edit(model, KeepHeads(path=layers[0].attention.path, size=1), keep=torch.tensor([1]))
    edit(model, DropSublayers(path=layers[1].path, sublayers=("attention",)))
    edit(model, DropLayers(keep=(0, 1, 2, 3)))
    cache = LazyCache(model)
    model.generate(prompt(), past_key_values=cache, max_new_tokens=1, **GREEDY)
    assert cache.rates == RATES  # but where attention is gone nothing is ranked, and none comes after the last layer
    assert [rows.count for rows in cache.kv] == [24, 24, 24, 24 - int(0.3 * 24)]
    assert model.generate(prompt(), max_new_tokens=6, **GREEDY).shape == (1, 30)
    dense = model.generate(prompt(), past_key_values=LazyCache(model, {}), max_new_tokens=6, **GREEDY)
    with torch.no_grad():
        assert model(prompt()).logits[0, -1].argmax() == dense[0, 24]


def test_the_method_makes_edits_and_says_what_is_left():
    subject = decoder(num_hidden_layers=8, initializer_range=0.2)
    before, info = outputs(subject), get("lazyllm")
    info.check(subject)
    method = info.build()
    assert method.estimate(subject.anatomy) == Saving() and info.starts() == []
    method(subject)
    assert [made.path for made in ledger(subject.model)] == ["layers.2", "layers.3", "layers.5", "layers.6"]
    assert subject.notes["mean_keep"] == pytest.approx((3 + 0.7 + 2 * 0.49 + 0.343 + 0.2401) / 8)
    assert 1.2 < subject.notes["predicted_prefill_speedup"] < 2
    assert torch.equal(outputs(subject), before)  # forward passes of batches are the dense model's
    lazy = lean.apply(
        [{"method": "lazyllm", "layers": [2, 4], "rates": [0.1, 0.5]}], decoder(num_hidden_layers=6).model
    )
    assert LazyCache(lazy).rates == {2: 0.1, 4: 0.5}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rates": [1.0]}, "from 0 to below 1"),
        ({"rates": []}, "one at least"),
        ({"layers": [0, 1], "rates": [0.1, 0.2, 0.3]}, "2 layers and 3 rates"),
        ({"layers": [0, 9]}, "has 3 layers, and layer 9 is not one"),
        ({"rates": [0.1, 0.2, 0.3]}, "3 rates for the layers"),
    ],
)
def test_bad_settings_are_refused_before_any_work(settings, words):
    with pytest.raises(LeanError, match=words) as caught:
        get("lazyllm").check(decoder(), settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES_TINY)
def test_every_family_is_taken_or_refused_in_one_sentence(family):
    reason = get("lazyllm").unsuitable(Anatomy.of(FAMILIES_TINY[family]()))
    assert (reason is None) == (family in CAUSAL)
    assert reason is None or "\n" not in reason


def test_why_a_model_cannot_is_said():
    def refused(model):
        with pytest.raises(LeanError) as caught:
            edit(model, PrunePrompt(path=Anatomy.of(model).layers[0].path, rate=0.3))
        assert not ledger(model)
        return str(caught.value)

    assert "looks both ways" in refused(encoder().model)
    assert "has an encoder" in refused(TINY["t5"]())
    assert "sliding_attention" in refused(TINY["gemma3"]())
    assert "sliding windows" in refused(TINY["mistral"](sliding_window=8))
    with pytest.raises(LeanError, match="rate from 0 to below 1"):
        edit(tiny(), PrunePrompt(path="layers.1", rate=1.0))
    with pytest.raises(LeanError, match="No layer at 'layers"):
        edit(tiny(), PrunePrompt(path="layers.9", rate=0.5))
    with pytest.raises(LeanError, match="does not prune tokens: apply the method 'lazyllm'"):
        LazyCache(tiny())
    with pytest.raises(LeanError, match="Layer 7 cannot drop"):
        LazyCache(pruned(), {7: 0.3})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_ids": prompt().repeat(2, 1)}, "a batch of 2 was given: run the sequences one by one"),
        ({"attention_mask": torch.tensor([[0] * 3 + [1] * 21])}, "without padding"),
        ({"num_beams": 3}, "num_beams is 3, make it 1"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences is 2"),
        ({"past_key_values": "dynamic"}, "needs a LazyCache, not a DynamicCache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"cache_implementation": "quantized"}, "cache_implementation"),
        ({"use_cache": False}, "use_cache cannot be False"),
        ({"assistant_model": "self"}, "cannot take tokens back, which assistant_model"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "no output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "no output_hidden_states"),
    ],
)
def test_ways_of_generating_that_do_not_go_are_refused(options, words):
    model = pruned()
    if options.get("past_key_values") == "dynamic":
        options = {"past_key_values": T.DynamicCache(config=model.config)}
    if options.get("assistant_model") == "self":
        options = {"assistant_model": model}
    with pytest.raises(LeanError, match=words) as caught:
        model.generate(**{"input_ids": prompt(), "max_new_tokens": 2, **GREEDY, **options})
    assert "\n" not in str(caught.value)


def test_calls_that_do_not_go_are_refused():
    model = pruned()
    with pytest.raises(LeanError, match="in inference only"):
        model.train()(prompt(), past_key_values=LazyCache(model))
    model.eval().set_attn_implementation("eager")
    with pytest.raises(LeanError, match="set to 'eager': call"):
        model.generate(prompt(), max_new_tokens=2, **GREEDY)
    with pytest.raises(LeanError, match="one sequence and takes no token back"):
        LazyCache(model).reorder_cache(torch.zeros(1))
    other = tiny()
    with pytest.raises(LeanError, match="made for another model"):
        edit(other, PrunePrompt(path="layers.1", rate=0.3))(prompt(), past_key_values=LazyCache(model))
