"""Decoding through the stream-K kernel, under transformers' own generate: SDPA's tokens, whatever cache and padding."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from interpreting import interpret, needs_triton

from leanformers.errors import LeanError
from leanformers.parts import decode_attention
from leanformers.parts.decode_attention import DECODE, decode_mask, register_decode, spans_of

interpret()
pytestmark = needs_triton
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 96,
    "initializer_range": 0.3,
}


def llama():
    return T.LlamaForCausalLM(T.LlamaConfig(**SIZES))


def mistral():
    return T.MistralForCausalLM(T.MistralConfig(**SIZES, sliding_window=6))


def gpt2():
    config = T.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=64, initializer_range=0.3)
    return T.GPT2LMHeadModel(config)


def bart():
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    config = T.BartConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, vocab_size=96, init_std=0.3, num_beams=1, **heads
    )
    return T.BartForConditionalGeneration(config)


@pytest.fixture
def kernels(monkeypatch):
    """How often the kernel attended with spans, and without."""
    calls = {"spans": 0, "whole": 0}
    real = decode_attention.decode_attention

    def counted(query, key, value, spans, **options):
        calls["whole" if spans is None else "spans"] += 1
        return real(query, key, value, spans, **options)

    monkeypatch.setattr(decode_attention, "decode_attention", counted)
    return calls


def generated(model, attention, mask, **options):
    torch.manual_seed(0)
    ids = torch.randint(5, 96, mask.shape)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip


def check_as_sdpa(model, mask, **options):
    expected = generated(model.eval(), "sdpa", mask, **options)
    found = generated(model, register_decode(), mask, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for left, right in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


WHOLE = torch.ones(2, 9, dtype=torch.long)
LEFT = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
RIGHT = LEFT.flip(-1)  # generation goes on behind the padding, so its masks have holes


@pytest.mark.parametrize(
    ("make", "mask", "cache"),
    [
        (llama, WHOLE, None),
        (llama, LEFT, None),
        (llama, WHOLE, "static"),
        (llama, LEFT, "static"),
        (mistral, LEFT, None),
        (mistral, LEFT, "static"),
        (gpt2, LEFT, None),
        (bart, LEFT, None),
        (bart, WHOLE, "static"),
    ],
)
def test_generate_gives_sdpas_tokens(make, mask, cache, kernels):
    torch.manual_seed(0)
    check_as_sdpa(make(), mask, cache_implementation=cache)
    assert sum(kernels.values()) >= 3  # steps; the prompt goes through SDPA


@pytest.mark.parametrize(("graph", "mask", "ours"), [(False, WHOLE, 0), (True, WHOLE, 3), (False, LEFT, 3)])
def test_without_a_graph_caches_of_one_length_are_left_to_sdpa(graph, mask, ours, kernels, monkeypatch):
    monkeypatch.setattr(decode_attention, "_launches_are_free", lambda device: graph)
    torch.manual_seed(0)
    check_as_sdpa(llama(), mask)
    assert sum(kernels.values()) == ours


def test_launches_are_free_where_a_graph_replays_them(monkeypatch):
    free = decode_attention._launches_are_free
    capturing = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    assert free(torch.device("cpu")) and not free(torch.device("cuda"))
    capturing.append(1)
    assert free(torch.device("cuda"))


def test_a_mask_with_holes_is_left_to_sdpa(kernels):
    torch.manual_seed(0)
    check_as_sdpa(llama(), RIGHT)
    assert sum(kernels.values()) == 0


def test_beams_reorder_the_cache(kernels):
    torch.manual_seed(0)
    check_as_sdpa(llama(), LEFT, num_beams=2)
    assert kernels["spans"] > 0


def test_spans_are_the_runs_of_a_mask():
    seen = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    assert spans_of(seen).tolist()[:3] == [[1, 3], [0, 4], [3, 4]]
    start, end = spans_of(seen).tolist()[3]
    assert start == end
    assert spans_of(torch.tensor([[1, 0, 1]], dtype=torch.bool)) is None


def test_a_prompt_has_sdpas_own_mask():
    from transformers.masking_utils import sdpa_mask

    options = {"batch_size": 2, "kv_length": 9, "attention_mask": LEFT.bool()}
    assert torch.equal(decode_mask(q_length=9, **options), sdpa_mask(q_length=9, **options))
    assert decode_mask(q_length=1, q_offset=8, **options).tolist() == [[[[0, 9]]], [[[4, 9]]]]


def test_a_compiled_step_has_no_graph_break():
    torch.manual_seed(0)
    model = llama().eval()
    model.set_attn_implementation(register_decode())
    cache = T.StaticCache(config=model.config, max_cache_len=16)
    ids = torch.randint(5, 96, (2, 9))
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        mask = torch.tensor([[0, 10], [2, 10]], dtype=torch.int32)[:, None, None]

        def step(token, mask, position):
            return model(token, attention_mask=mask, position_ids=position, past_key_values=cache).logits

        compiled = torch.compile(step, backend="eager", fullgraph=True)
        inputs = (ids[:, :1], mask, torch.full((2, 1), 9))
        found = compiled(*inputs)
    assert found.isfinite().all()


def test_what_the_kernel_does_not_know_is_refused():
    torch.manual_seed(0)
    model = T.Gemma2ForCausalLM(T.Gemma2Config(**SIZES, head_dim=16)).eval()
    model.set_attn_implementation(register_decode())
    with torch.no_grad(), pytest.raises(LeanError, match="caps its attention scores"):
        model.generate(torch.randint(5, 96, (1, 4)), max_new_tokens=2)
    model = llama().train()
    model.set_attn_implementation(DECODE)
    with pytest.raises(LeanError, match="no gradients"):
        model(torch.randint(5, 96, (1, 1)))


def test_without_a_gpu_decoding_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = llama().eval()
    model.set_attn_implementation(register_decode())
    ids = torch.randint(5, 96, (1, 4))
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()  # a prompt is SDPA's
        if not torch.cuda.is_available():
            with pytest.raises(LeanError, match="runs on a GPU, not on 'cpu'"):
                model(ids[:, :1])
