"""What stands in a GGUF file, seen by gguf's own reader, and what is refused."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
from gguf_making import changed, make_uneven, read, tiny, tokenizer_of, without_parts

from families import TINY, inputs, outputs
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.runtimes.gguf import fallback_note, row_multiple, write_gguf
from leanformers.runtimes.gguf import write as write_module
from leanformers.runtimes.gguf.tensors import interleave, matrix
from leanformers.surgery import (
    DropLayers,
    FactoriseLinear,
    KeepNeurons,
    KeepVocabulary,
    MaskWeights,
    QuantiseEmbeddings,
    QuantiseLinear,
    SliceResidual,
    apply,
)
from leanformers.surgery.tokenizers import choose, count, trim
from vocabularies import MAKERS, OTHER, TEXTS

pytest.importorskip("gguf")
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def written(model: Any, path: Any, **options: Any) -> Any:
    return read(write_gguf(model, options.pop("tokenizer", None), path / "model.gguf", **options))


# -- tensors and sizes -----------------------------------------------------------------------------------------


def test_uniform_layers_go_under_their_own_architecture(tmp_path):
    file = written(tiny(tie_word_embeddings=False), tmp_path)
    names = {f"blk.{i}.{part}.weight" for i in range(3) for part in (*PARTS, "attn_norm", "ffn_norm")}
    assert set(file.tensors) == names | {"token_embd.weight", "output_norm.weight", "output.weight"}
    assert file.fields["general.architecture"] == "llama"
    wanted = {
        "block_count": 3,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.dimension_count": 16,
        "context_length": 64,
        "vocab_size": 96,
        "rope.freq_base": 10000.0,
    }
    assert {name: file.fields[f"llama.{name}"] for name in wanted} == wanted
    assert file.tensors["blk.0.attn_k.weight"].shape == (32, 64)
    assert file.tensors["blk.0.ffn_down.weight"].shape == (64, 96)
    assert {file.types[name] for name in names if "norm" not in name} == {"F16"}
    assert {file.types[name] for name in names if "norm" in name} == {"F32"}
    assert file.fields["tokenizer.ggml.model"] == "no_vocab"


def test_a_tied_head_is_written_once(tmp_path):
    assert "output.weight" not in written(tiny(tie_word_embeddings=True), tmp_path).tensors


def test_layers_of_different_width_go_under_deci(tmp_path):
    file = written(make_uneven(tiny()), tmp_path)
    assert file.fields["general.architecture"] == "deci"
    assert file.fields["deci.feed_forward_length"] == [96, 64, 96]
    assert file.fields["deci.attention.head_count"] == [4, 4, 2]
    assert file.fields["deci.attention.head_count_kv"] == [2, 2, 1]
    assert file.tensors["blk.1.ffn_up.weight"].shape == (64, 64)
    assert file.tensors["blk.2.attn_q.weight"].shape == (32, 64)
    assert file.tensors["blk.2.attn_output.weight"].shape == (64, 32)


def test_dropped_layers_leave_a_uniform_model(tmp_path):
    model = tiny()
    kept = matrix(Anatomy.of(model).layers[2].feed_forward.up.module)
    apply(model, DropLayers(keep=(0, 2)))
    file = written(model, tmp_path, dtype="f32")
    assert file.fields["general.architecture"] == "llama" and file.fields["llama.block_count"] == 2
    assert np.array_equal(file.tensors["blk.1.ffn_up.weight"], kept.numpy())


def test_rows_of_queries_and_keys_are_interleaved(tmp_path):
    model = tiny("llama-ungrouped", num_key_value_heads=4)
    attention = Anatomy.of(model).layers[1].attention
    file = written(model, tmp_path, dtype="f32")
    for part, projection in (("attn_q", attention.query), ("attn_k", attention.key)):
        for kind, tensor in (("weight", projection.module.weight), ("bias", projection.module.bias)):
            found = torch.from_numpy(file.tensors[f"blk.1.{part}.{kind}"])
            # Row i and row i + 8 of a head of 16 stand beside each other.
            heads = found.view(4, 8, 2, *found.shape[1:])
            assert torch.equal(torch.cat([heads[:, :, 0], heads[:, :, 1]], dim=1).reshape(found.shape), tensor)
    assert np.array_equal(file.tensors["blk.1.attn_v.weight"], attention.value.module.weight.detach().numpy())


def test_interleaving_by_hand():
    assert interleave(torch.arange(8), 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_dtypes(tmp_path, dtype):
    model = tiny()
    file = written(model, tmp_path, dtype=dtype)
    found = file.tensors["blk.0.ffn_up.weight"]
    if dtype == "bf16":  # the reader hands out bytes
        found = torch.from_numpy(found.view(np.int16)).view(torch.bfloat16).float().numpy()
    exact = Anatomy.of(model).layers[0].feed_forward.up.weight().detach()
    rounded = exact.to(write_module.DTYPES[dtype]).float()
    assert file.types["blk.0.ffn_up.weight"] == dtype.upper()
    assert np.array_equal(found.astype(np.float32), rounded.numpy())


def test_edits_of_weights(tmp_path):
    model = tiny(tie_word_embeddings=True)
    paths = Anatomy.of(model).paths(["gate", "up", "down"])
    apply(model, FactoriseLinear(path=paths[0], rank=8))
    apply(model, MaskWeights(path=paths[1]), mask=torch.rand(96, 64) > 0.5)
    apply(model, FactoriseLinear(path=paths[4], rank=8))
    apply(model, QuantiseLinear(path=f"{paths[4]}.up"))
    apply(model, QuantiseLinear(path=paths[5], scheme="int8_dynamic"))
    apply(model, QuantiseEmbeddings())
    anatomy = Anatomy.of(model)
    file = written(model, tmp_path, dtype="f32")
    found = {name: torch.from_numpy(array) for name, array in file.tensors.items()}
    for name, path in (
        ("0.ffn_gate", paths[0]),
        ("0.ffn_up", paths[1]),
        ("1.ffn_up", paths[4]),
        ("1.ffn_down", paths[5]),
    ):
        torch.testing.assert_close(found[f"blk.{name}.weight"], anatomy.module(path).weight.detach())
    assert (found["blk.0.ffn_up.weight"] == 0).float().mean() > 0.4
    assert torch.equal(found["token_embd.weight"], anatomy.embeddings.dequantise())
    assert "output.weight" not in found


def test_fused_projections_are_written_apart(tmp_path):
    model = tiny("phi3")
    file = written(model, tmp_path, dtype="f32")
    assert file.fields["general.architecture"] == "llama"
    attention = Anatomy.of(model).layers[2].attention
    assert np.array_equal(file.tensors["blk.2.attn_v.weight"], attention.value.weight().detach().numpy())
    assert np.array_equal(file.tensors["blk.2.attn_k.weight"], interleave(attention.key.weight(), 16).detach().numpy())


def test_gains_with_an_offset_and_norms_of_heads(tmp_path):
    model = tiny("gemma3")
    file = written(model, tmp_path)
    layer = Anatomy.of(model).layers[3]
    for name, norm in (("attn_norm", layer.norms[0]), ("post_ffw_norm", layer.norms[3])):
        assert np.array_equal(file.tensors[f"blk.3.{name}.weight"], (1 + norm.module.weight).detach().numpy())
    gain = 1 + layer.attention.key_norm.weight
    assert np.array_equal(file.tensors["blk.3.attn_k_norm.weight"], gain.detach().numpy())


def test_which_layers_slide(tmp_path):
    model = tiny("gemma3", sliding_window=5)
    fields = written(model, tmp_path).fields
    assert fields["gemma3.attention.sliding_window"] == 5 and fields["gemma3.rope.freq_base_swa"] == 10000.0
    assert "gemma3.attention.sliding_window_pattern" not in fields  # every sixth does not, of itself
    apply(model, DropLayers(keep=(0, 5, 6)))
    assert written(model, tmp_path).fields["gemma3.attention.sliding_window_pattern"] == [True, False, True]


def test_scaled_positions_become_factors(tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    file = written(tiny(rope_parameters=rope), tmp_path)
    assert np.allclose(file.tensors["rope_freqs.weight"], np.full(8, 4.0))
    assert file.fields["llama.rope.freq_base"] == 500.0


def test_a_sliding_window_bounds_the_context(tmp_path):
    assert written(tiny("mistral", sliding_window=24), tmp_path).fields["llama.context_length"] == 24


def test_parts_that_are_gone(tmp_path):
    file = written(without_parts(attention=(0, 1), feed_forward=2), tmp_path)
    # llama.cpp reads the head size off the first layer, so that one head of zeros stays there.
    assert file.fields["deci.attention.head_count"] == [1, 0, 4]
    assert file.fields["deci.attention.head_count_kv"] == [1, 0, 2]
    assert not file.tensors["blk.0.attn_output.weight"].any()
    assert not any(name.startswith("blk.1.attn") for name in file.tensors)
    assert file.fields["deci.feed_forward_length"] == [96, 96, 32]
    assert not file.tensors["blk.2.ffn_down.weight"].any()


def test_transformers_reads_what_was_written(tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = tiny(vocab_size=2000), tokenizer_of()
    write_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="f32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    batch = inputs(model)
    torch.testing.assert_close(outputs(again.eval(), batch), outputs(model, batch), rtol=1e-5, atol=1e-5)


# -- tokenizers ------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_written_whole(tmp_path):
    tokenizer = tokenizer_of("smollm", first=True)
    fields = written(tiny(vocab_size=len(tokenizer) + 3), tmp_path, tokenizer=tokenizer).fields
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.ggml.tokens"][:-3] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[:3] == [3, 3, 1] and kinds[-3:] == [5, 5, 5]
    assert len(fields["tokenizer.ggml.merges"][0].split(" ")) == 2
    assert fields["tokenizer.ggml.bos_token_id"] == 1 and fields["tokenizer.ggml.eos_token_id"] == 0
    assert fields["tokenizer.ggml.padding_token_id"] == 0 and "tokenizer.ggml.unknown_token_id" not in fields
    assert fields["tokenizer.ggml.add_bos_token"] and not fields["tokenizer.ggml.add_eos_token"]
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template


def test_a_trimmed_vocabulary(tmp_path):
    model, tokenizer = tiny(vocab_size=2000, pad_token_id=0, bos_token_id=1, eos_token_id=0), tokenizer_of()
    keep = choose(count(tokenizer, TEXTS[:50]), tokenizer)
    apply(model, KeepVocabulary(size=len(keep)), keep=torch.as_tensor(keep))
    small = trim(tokenizer, keep)
    file = written(model, tmp_path, tokenizer=small)
    assert len(file.fields["tokenizer.ggml.tokens"]) == len(keep) == file.tensors["token_embd.weight"].shape[0] < 2000
    assert file.fields["tokenizer.ggml.pre"] == "gpt-2"


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "end-of-word", "byte-fallback", "byte-level"])
def test_other_tokenizers_are_refused(tmp_path, kind):
    tokenizer = MAKERS[kind]()
    with pytest.raises(LeanError, match=rf"{type(tokenizer).__name__}.*is no byte-level BPE of a kind.*tokenizer=None"):
        written(tiny(vocab_size=4000), tmp_path, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "rooms",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"model": {"ignore_merges": True}},
    ],
)
def test_other_rules_are_refused(tmp_path, rooms):
    with pytest.raises(
        LeanError, match=r"is no byte-level BPE of a kind that llama\.cpp has a rule for: gpt-2, smollm"
    ):
        written(tiny(vocab_size=2000), tmp_path, tokenizer=changed(tokenizer_of(), **rooms))


def test_a_fallback_to_bytes_that_nothing_needs(tmp_path):
    """Where all bytes have a character, none falls back; where one has not, another token stands for it."""
    tokenizer = changed(tokenizer_of(), model={"byte_fallback": True})
    assert written(tiny(vocab_size=2000), tmp_path, tokenizer=tokenizer).fields["tokenizer.ggml.pre"] == "gpt-2"
    for text in OTHER:
        assert tokenizer(text)["input_ids"] == tokenizer_of()(text)["input_ids"]
    vocabulary = {token: index for token, index in tokenizer.get_vocab().items() if token != "\u0100"}
    merges = [
        m for m in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"] if "\u0100" not in "".join(m)
    ]
    narrow = changed(tokenizer, model={"vocab": vocabulary, "merges": merges})
    with pytest.raises(LeanError, match="is no byte-level BPE of a kind"):
        written(tiny(vocab_size=2000), tmp_path, tokenizer=narrow)


def test_tokens_that_the_format_cannot_say(tmp_path):
    from tokenizers import AddedToken

    tokenizer = tokenizer_of()
    with pytest.raises(LeanError, match="has 2000 tokens and the model 96 rows of embeddings"):
        written(tiny(), tmp_path, tokenizer=tokenizer)
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    with pytest.raises(LeanError, match=r"'<mask>'.*takes the spaces beside it along"):
        written(tiny(vocab_size=3000), tmp_path, tokenizer=tokenizer)
    framed = tokenizer_of(first=True, bos_token="<|end|>")
    with pytest.raises(LeanError, match="puts other tokens around a text"):
        written(tiny(vocab_size=3000), tmp_path, tokenizer=framed)


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, head", [("bert", "lm"), ("gpt2", "lm"), ("t5", "lm"), ("llama", "classification"), ("llama", "base")]
)
def test_models_without_an_equal(tmp_path, family, head):
    with pytest.raises(LeanError, match="cannot be written as GGUF: only causal language models of llama, mistral"):
        written(TINY[family](head=head), tmp_path)


def test_uneven_layers_are_refused_where_there_is_no_graph(tmp_path):
    model = tiny("qwen3")
    path = Anatomy.of(model).layers[1].feed_forward.path
    apply(model, KeepNeurons(path=path, size=64), keep=torch.arange(64))
    with pytest.raises(LeanError, match=r"layers\.1 has .*64 neurons and layers\.0 has .*96 neurons.*not for qwen3"):
        written(model, tmp_path)


@pytest.mark.parametrize(
    "family, fields, what",
    [
        ("llama", {"hidden_act": "gelu"}, "a feed-forward other than gated silu at layers.0.mlp"),
        ("gemma3", {"query_pre_attn_scalar": 64}, "attention scores scaled by 0.125"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "soft-capped logits"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, r"\(yarn\)"),
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, r"\(linear\)"),
        ("phi3", {"partial_rotary_factor": 0.5}, "rotates a part of each head alone"),
    ],
)
def test_what_the_graph_does_not_compute(tmp_path, family, fields, what):
    with pytest.raises(LeanError, match=what):
        written(tiny(family, **fields), tmp_path)


def test_embeddings_that_keep_the_scale_of_a_wider_stream(tmp_path):
    model = tiny("gemma3")
    apply(model, SliceResidual(size=32), keep=torch.arange(32))
    file = written(model, tmp_path, dtype="f32")
    # llama.cpp multiplies by the root of 32, the model by that of 64; the tied head has the table as it is.
    assert np.allclose(file.tensors["token_embd.weight"], 2**0.5 * file.tensors["output.weight"])
    assert "output.weight" not in written(tiny("gemma3"), tmp_path).tensors


def test_adapters_are_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(target_modules=["up_proj"])).base_model.model
    with pytest.raises(LeanError, match=r"layers\.0\.mlp\.up_proj is a Linear, .*merge adapters"):
        written(model, tmp_path)


def test_parameters_without_a_place_are_refused(tmp_path):
    model = tiny()
    Anatomy.of(model).layers[1].module.register_parameter("gate", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(LeanError, match=r"has further parameters \(model\.layers\.1\.gate\)"):
        written(model, tmp_path)
    model = tiny()
    Anatomy.of(model).layers[1].module.input_layernorm = torch.nn.LayerNorm(64)
    with pytest.raises(LeanError, match=r"has a norm other than RMSNorm at layers\.1\.input_layernorm"):
        written(model, tmp_path)


def test_a_number_outside_the_range_leaves_no_file(tmp_path):
    model = tiny()
    Anatomy.of(model).layers[0].feed_forward.up.module.weight.data[0, 0] = 1e6
    with pytest.raises(
        LeanError, match=r"blk\.0\.ffn_up\.weight holds a number that is not finite in f16.*bf16 or f32"
    ):
        written(model, tmp_path)
    assert not list(tmp_path.iterdir())
    written(model, tmp_path, dtype="bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_bad_settings(tmp_path, monkeypatch):
    with pytest.raises(LeanError, match="no dtype 'q8_0' for a GGUF file: choose one of f32, f16, bf16"):
        written(tiny(), tmp_path, dtype="q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LeanError, match=r"needs the package gguf: pip install 'leanformers\[llamacpp\]'"):
        written(tiny(), tmp_path)


# -- widths for quantised kinds --------------------------------------------------------------------------------


def test_multiples():
    assert [row_multiple(kind) for kind in ("f16", "q8_0", "q4_k_m", "q6_k")] == [1, 32, 256, 256]
    with pytest.raises(LeanError, match="no quantisation 'q3' for GGUF files: choose one of q8_0, q4_k_m"):
        row_multiple("q3")


def test_widths_that_fall_back_or_do_not_fit(tmp_path):
    path = write_gguf(tiny(), None, tmp_path / "model.gguf")
    assert fallback_note(path, "q8_0") is None
    assert "23 of 23 matrices (100% of the weights)" in (fallback_note(path, "q4_k_m") or "")
    model = tiny()
    apply(model, KeepNeurons(path=Anatomy.of(model).layers[1].feed_forward.path, size=40), keep=torch.arange(40))
    path = write_gguf(model, None, tmp_path / "narrow.gguf")
    with pytest.raises(LeanError, match=r"layer 1 \(blk\.1\.ffn_down\.weight\) has 40 inputs, no multiple of 32.*q8_0"):
        fallback_note(path, "q8_0")
    with pytest.raises(LeanError, match="is no GGUF file that can be read"):
        fallback_note(__file__, "q8_0")
