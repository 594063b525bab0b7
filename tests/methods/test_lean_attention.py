"""The method that switches decoding to stream-K attention: what it changes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from interpreting import interpret, needs_triton
from subjects import BOTH, SIZES, outputs

import leanformers as lean
from families import FAMILIES_TINY
from leanformers.errors import LeanError
from leanformers.methods import Saving, base, get
from leanformers.surgery import DropSublayers, KeepHeads, SwapAttention
from leanformers.surgery import apply as edit

interpret()
pytestmark = needs_triton
STEP = {"method": "lean-attention"}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Triton's interpreter stands in for the GPU."""
    meets = base._meets
    monkeypatch.setattr(base, "_meets", lambda need, subject: need == "gpu" or meets(need, subject))


def test_without_a_gpu_it_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    subject = BOTH["decoder"]()
    with pytest.raises(LeanError, match="needs a GPU; run it on a machine with CUDA"):
        lean.apply([STEP], (subject.model, subject.tokenizer), subject.task)


def test_it_decodes_the_same_tokens(as_on_a_gpu):
    subject = BOTH["decoder"](hidden_size=64, initializer_range=0.3)
    model = subject.model
    ids = torch.randint(5, 60, (2, 6))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    switched = lean.apply([STEP], model)
    assert switched.config._attn_implementation == "lean_attention"
    assert model.config._attn_implementation == "sdpa"  # a copy was switched
    assert torch.equal(switched.generate(ids, **options), expected)


def test_it_leaves_forward_passes_to_sdpa(as_on_a_gpu):
    subject = BOTH["decoder"](hidden_size=64)
    before = outputs(subject)
    info = get("lean-attention")
    info.check(subject)
    info.build()(subject)
    assert torch.equal(outputs(subject), before)
    assert "apply lean-attention again" in subject.notes["attention"]


def test_it_saves_no_weights_and_offers_a_search_nothing(as_on_a_gpu):
    subject = BOTH["decoder"](hidden_size=64)
    assert get("lean-attention").build().estimate(subject.anatomy) == Saving()
    assert get("lean-attention").starts() == []


def test_a_slimmed_model_decodes_the_same_tokens(as_on_a_gpu):
    model = BOTH["decoder"](hidden_size=64, initializer_range=0.3).model
    first, *_, last = lean.Anatomy.of(model).layers
    edit(model, KeepHeads(path=first.attention.path, size=1), keep=torch.tensor([1]))
    edit(model, DropSublayers(path=last.path, sublayers=("attention",)))
    ids = torch.randint(5, 60, (1, 6))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(lean.apply([STEP], model).generate(ids, **options), model.generate(ids, **options))


def refused(model):
    return get("lean-attention").unsuitable(lean.Anatomy.of(model))


def test_what_does_not_suit_is_named():
    assert "does not decode" in refused(BOTH["encoder"]().model)
    assert "heads of 16, 32, 64, 128, 256, not 8" in refused(BOTH["decoder"]().model)
    gemma = T.Gemma2Config(**SIZES, num_key_value_heads=2, vocab_size=96, head_dim=16)
    with_mixer = BOTH["decoder"](hidden_size=64).model
    for layer in lean.Anatomy.of(with_mixer).layers:
        edit(with_mixer, SwapAttention(path=layer.attention.path, mixer="top_k", settings={"k": 4}))
    assert "holds a mixer" in refused(with_mixer)
    t5 = T.T5Config(d_model=32, d_kv=16, num_heads=2, d_ff=32, num_layers=1, vocab_size=96)
    assert "bias of positions" in refused(T.T5ForConditionalGeneration(t5))
    try:
        assert "caps its attention scores" in refused(T.Gemma2ForCausalLM(gemma))
    except LeanError as error:  # a family that anatomy does not know
        assert "gemma2" in str(error).lower()


@pytest.mark.parametrize("family", FAMILIES_TINY)
def test_every_family_is_taken_or_refused_in_one_sentence(family):
    reason = refused(FAMILIES_TINY[family]())
    assert reason is None or "\n" not in reason
