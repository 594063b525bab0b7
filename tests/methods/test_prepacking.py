"""`generate` that prefills without padding: the same tokens, and the padded path wherever packing has no answer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from subjects import BOTH, EVERY, outputs
from transformers import pipeline

import leanformers as lean
from families import FAMILIES_TINY, TINY
from leanformers.errors import LeanError
from leanformers.methods import Saving, get
from leanformers.packing import is_prepacked
from leanformers.surgery import DropSublayers, KeepHeads
from leanformers.surgery import apply as edit

STEP = {"method": "prepacking"}
OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
LENGTHS = (3, 1, 9, 4, 7, 1, 2)


def batch_of(lengths=LENGTHS, extra=0, vocabulary=60):
    """Left-padded prompts, with so many columns too many."""
    width = max(lengths) + extra
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(5, vocabulary, mask.shape) * mask, "attention_mask": mask}


def counted(model):
    """How many positions each call of the base model's first layer sees."""
    seen = []
    layers = lean.Anatomy.of(model).layers
    layers[0].module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2].numel()))
    return seen


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "gpt-neox", "phi3", "mistral"])
def test_the_same_tokens_come_out(name, extra):
    model = TINY[name]()
    batch = batch_of(extra=extra)
    expected = model.generate(**batch, **OPTIONS)
    packed = lean.prepack(model)
    seen = counted(packed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(packed.generate(**batch, **OPTIONS), expected)
    assert seen[0] == sum(LENGTHS) - len(LENGTHS) and seen[1] == len(LENGTHS)
    assert torch.equal(packed.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **OPTIONS), expected)


def test_gemma_within_its_window_and_beyond():
    model = TINY["gemma3"]()
    packed = lean.prepack(model)
    within = batch_of((3, 1, 4, 2))
    assert torch.equal(packed.generate(**within, **OPTIONS), model.generate(**within, **OPTIONS))
    beyond = batch_of()
    with pytest.warns(UserWarning, match="prefilled padded.*looks back 4 tokens"):
        found = packed.generate(**beyond, **OPTIONS)
    assert torch.equal(found, model.generate(**beyond, **OPTIONS))
    with warnings.catch_warnings():  # told once
        warnings.simplefilter("error")
        packed.generate(**beyond, **OPTIONS)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_what_generate_can_be_asked_for(asked):
    model, batch = TINY["llama"](), batch_of()
    packed = lean.prepack(model)
    seen = counted(packed)
    found = []
    for one in (model, packed):
        torch.manual_seed(3)
        found.append(one.generate(**batch, **{**OPTIONS, **asked}))
    if "output_scores" in asked:
        torch.testing.assert_close(found[0].scores, found[1].scores, rtol=0, atol=1e-4)
        found = [one.sequences for one in found]
    assert torch.equal(*found)
    assert seen[0] == sum(LENGTHS) - len(LENGTHS)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"cache_implementation": "static"}, "a cache of its own layout"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states of the prompts"),
        ({"prefill_chunk_size": 4}, "cuts the prompts into chunks"),
        ({"use_cache": False}, "keeps no cache"),
        ({"prompt_lookup_num_tokens": 2}, "looks up tokens"),
        ({"position_ids": True}, "given 'position_ids'"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_packed_prompts_do_not_serve_is_prefilled_padded(asked, words):
    model, batch = TINY["llama"](), batch_of() if "prompt_lookup_num_tokens" not in asked else batch_of((2, 7))
    if "position_ids" in asked:
        asked = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    packed = lean.prepack(model)
    seen = counted(packed)
    try:
        expected = model.generate(**batch, **{**OPTIONS, **asked})
    except ValueError:  # transformers has its own refusal, and it stays
        with pytest.warns(UserWarning, match=words), pytest.raises(ValueError):
            packed.generate(**batch, **{**OPTIONS, **asked})
        return
    with pytest.warns(UserWarning, match=words):
        found = packed.generate(**batch, **{**OPTIONS, **asked})
    if "return_dict_in_generate" in asked:
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)
    assert seen[0] in (batch["input_ids"].numel(), 4 * len(batch["input_ids"]))


def test_where_there_is_no_padding_nothing_is_packed():
    model = TINY["llama"]()
    packed = lean.prepack(model)
    seen = counted(packed)
    for batch in (batch_of((5,), extra=2), batch_of((5, 5)), {"input_ids": batch_of((5, 5))["input_ids"]}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(packed.generate(**batch, **OPTIONS), model.generate(**batch, **OPTIONS))
    nearly = batch_of((40, 40, 38))
    packed.generate(**nearly, **OPTIONS)
    assert nearly["input_ids"].numel() in seen


@pytest.mark.parametrize("holes", [False, True])
def test_padding_elsewhere_is_left_to_transformers(holes):
    model, batch = TINY["llama"](), batch_of()
    if holes:
        batch["attention_mask"][2, 4] = 0
    else:
        batch = {name: part.flip(1) for name, part in batch.items()}
    packed = lean.prepack(model)
    with pytest.warns(UserWarning, match="padded on the left alone"):
        found = packed.generate(**batch, **OPTIONS)
    assert torch.equal(found, model.generate(**batch, **OPTIONS))


def test_the_weights_are_shared_and_the_model_stays_as_it_was():
    model = TINY["llama"]()
    packed = lean.prepack(model)
    assert all(one is two for one, two in zip(model.parameters(), packed.parameters(), strict=True))
    assert is_prepacked(packed) and not is_prepacked(model) and "generate" not in vars(model)
    batch = batch_of()
    with torch.no_grad():
        assert torch.equal(packed(**batch).logits, model(**batch).logits)
    with pytest.raises(LeanError, match="prefills without padding already"):
        lean.prepack(packed)


def test_a_copy_packs_for_itself():
    model, batch = TINY["llama"](), batch_of()
    expected = model.generate(**batch, **OPTIONS)
    packed = lean.prepack(model)
    packed.generate(**batch, **OPTIONS)
    twin = copy.deepcopy(packed)
    with torch.no_grad():
        packed.lm_head.weight.zero_()
    seen = counted(twin)
    assert torch.equal(twin.generate(**batch, **OPTIONS), expected) and seen[0] == sum(LENGTHS) - len(LENGTHS)


def test_it_saves_as_the_model_does(tmp_path):
    packed = lean.prepack(TINY["llama"]())
    packed.save_pretrained(tmp_path)
    again = type(packed).from_pretrained(tmp_path).eval()
    batch = batch_of()
    assert torch.equal(again.generate(**batch, **OPTIONS), packed.generate(**batch, **OPTIONS))


# -------------------------------------------------------------------------------------------------------- the method
def test_the_method_changes_generate_alone():
    subject = EVERY["conv1d"]()
    before = outputs(subject)
    batch = batch_of()
    expected = subject.model.generate(**batch, **OPTIONS)
    switched = lean.apply([STEP], subject.model)
    assert is_prepacked(switched) and not is_prepacked(subject.model)
    assert torch.equal(switched.generate(**batch, **OPTIONS), expected)
    info = get("prepacking")
    info.check(subject)
    info.build()(subject)
    assert torch.equal(outputs(subject), before)
    assert "apply prepacking after loading" in subject.notes["generate"]
    assert info.build().estimate(subject.anatomy) == Saving() and info.starts() == []
    with pytest.raises(LeanError, match="already"):
        info.check(subject)


def test_a_slimmed_model_generates_the_same():
    model = BOTH["decoder"]().model
    first, *_, last = lean.Anatomy.of(model).layers
    edit(model, KeepHeads(path=first.attention.path, size=1), keep=torch.tensor([1]))
    edit(model, DropSublayers(path=last.path, sublayers=("attention",)))
    batch = batch_of()
    assert torch.equal(lean.apply([STEP], model).generate(**batch, **OPTIONS), model.generate(**batch, **OPTIONS))


@pytest.mark.parametrize("family", FAMILIES_TINY)
def test_every_family_is_taken_or_refused_in_one_sentence(family):
    model = FAMILIES_TINY[family]()
    reason = get("prepacking").unsuitable(lean.Anatomy.of(model))
    causal = family in ("gpt2", "gpt-neox", "opt", "llama", "mistral", "qwen3", "gemma3", "phi3")
    assert (reason is None) == causal
    assert reason is None or "\n" not in reason


def test_a_model_without_a_head_is_refused():
    with pytest.raises(LeanError, match="no head to generate with"):
        lean.prepack(TINY["llama"](head="base"))
    assert "no head" in get("prepacking").unsuitable(lean.Anatomy.of(TINY["llama"](head="classification")))


def test_a_pipeline_writes_the_same():
    subject = BOTH["decoder"](initializer_range=0.3)
    tokenizer = copy.deepcopy(subject.tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = ["A", "A warm film.", "Two hours of rain, a lighthouse, and the best performance of the year."]
    written = []
    for model in (subject.model, lean.prepack(subject.model)):
        pipe = pipeline("text-generation", model, tokenizer=tokenizer, device="cpu")
        seen = counted(model)
        written.append(pipe(texts, batch_size=3, do_sample=False, max_new_tokens=5))
    assert written[0] == written[1]
    assert seen[0] < 3 * max(len(tokenizer(text)["input_ids"]) for text in texts) - 3
