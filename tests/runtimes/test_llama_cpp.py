"""llama.cpp computes what the model does: logits, greedy tokens, token ids, and quantised files that run."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drawing import draw
from gguf_making import RULES, make_uneven, tiny, tokenizer_of, without_parts

from families import inputs, outputs
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.runtimes import available, llama_session, prepare
from leanformers.runtimes import llama_cpp as llama_cpp_module
from leanformers.runtimes.gguf import KINDS, quantize_gguf, write_gguf
from leanformers.runtimes.llama_cpp import Session, rates
from leanformers.surgery import (
    DropLayers,
    FactoriseLinear,
    KeepHeads,
    KeepNeurons,
    KeepVocabulary,
    MaskWeights,
    QuantiseEmbeddings,
    QuantiseLinear,
    apply,
)
from leanformers.surgery.tokenizers import choose, count, trim
from vocabularies import OTHER

runs = pytest.mark.skipif("llama.cpp" not in available(), reason="llama-cpp-python is not installed")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama": lambda: tiny(),
    "llama tied": lambda: tiny(tie_word_embeddings=True),
    "llama with biases": lambda: tiny("llama-ungrouped", num_key_value_heads=4),
    "llama, positions of llama 3": lambda: tiny(rope_parameters=LLAMA3),
    "llama, linear positions": lambda: tiny(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "mistral": lambda: tiny("mistral"),
    "mistral, wide heads": lambda: tiny("mistral", head_dim=32),
    "phi3": lambda: tiny("phi3"),
    "qwen3": lambda: tiny("qwen3"),
    "gemma3": lambda: tiny("gemma3", sliding_window=5),
    "gemma3, layers dropped": lambda: apply(tiny("gemma3", sliding_window=5), DropLayers(keep=(0, 5, 6))),
    "uneven llama": lambda: make_uneven(tiny()),
    "odd widths": lambda: odd(),
    "uneven llama with biases": lambda: make_uneven(tiny("llama-ungrouped", num_key_value_heads=2)),
    "uneven llama, positions of llama 3": lambda: make_uneven(tiny(rope_parameters=LLAMA3)),
    "uneven mistral": lambda: make_uneven(tiny("mistral", head_dim=32)),
    "uneven phi3": lambda: make_uneven(tiny("phi3")),
    "attention gone": lambda: without_parts(attention=(1,), feed_forward=2),
    "first attention gone": lambda: without_parts(attention=(0, 2), feed_forward=0),
    "last layer": lambda: without_parts(attention=(2,), feed_forward=2),
    "edits of weights": lambda: edited(),
    "dense and sparse factors": lambda: drawn(tiny(), "factorise_linear_dense_sparse"),
    "gemma3, sliced": lambda: drawn(tiny("gemma3"), "slice_residual"),
    "gemma3, sliced, int8 embeddings": lambda: drawn(tiny("gemma3"), "slice_residual", "quantise_embeddings"),
}


def drawn(model: Any, *kinds: str) -> Any:
    """With edits of these kinds, which llama.cpp has to follow."""
    for kind in kinds:
        edit, tensors = draw(model, kind)
        apply(model, edit, **tensors)
    return model.eval()


class Language:
    kind = "causal-lm"
    name = "words"

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return outputs(model, {key: batch[key] for key in ("input_ids", "attention_mask")})


def odd() -> Any:
    """Widths of no multiple, which cannot be quantised but run in floats; three key/value heads in every layer."""
    model = tiny(num_attention_heads=4, num_key_value_heads=4)
    for layer, size in zip(Anatomy.of(model).layers, (37, 1, 96), strict=True):
        apply(model, KeepNeurons(path=layer.feed_forward.path, size=size), keep=torch.arange(size))
        apply(model, KeepHeads(path=layer.attention.path, size=3), keep=torch.tensor([0, 1, 3]))
    return model


def edited() -> Any:
    model = tiny(tie_word_embeddings=True)
    paths = Anatomy.of(model).paths(["query", "gate", "up", "down"])
    apply(model, FactoriseLinear(path=paths[0], rank=8))
    apply(model, MaskWeights(path=paths[1]), mask=torch.rand(96, 64) > 0.5)
    apply(model, QuantiseLinear(path=paths[2]))
    apply(model, FactoriseLinear(path=paths[3], rank=8))
    apply(model, QuantiseLinear(path=f"{paths[3]}.up"))
    return apply(model, QuantiseEmbeddings())


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest one, as a share of the largest logit."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert not {"llama.cpp", "llama.cpp-q8_0", "llama.cpp-q4_k_m"} & set(available())
    with pytest.raises(LeanError, match=r"needs the packages gguf and llama-cpp-python: .*'leanformers\[llamacpp\]'"):
        prepare(tiny(), Language(), "llama.cpp")


def test_kernels_for_amx_are_not_used(monkeypatch, caplog):
    for report, found in ((b"AVX512 = 1 | AMX_INT8 = 1 | ", True), (b"AVX512 = 1 | ", False)):
        fake = SimpleNamespace(llama_print_system_info=lambda report=report: report)
        monkeypatch.setattr(llama_session, "library", lambda fake=fake: fake)
        assert llama_session.has_amx.__wrapped__() is found
    assert caplog.text.count("CFLAGS=-mno-amx-int8") == 1


@runs
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_logits_are_the_models_own(tmp_path, name, dtype):
    model = MODELS[name]()
    path = write_gguf(model, None, tmp_path / "model.gguf", dtype=dtype)
    batch = inputs(model, batch=1, length=23)
    ids, wanted = batch["input_ids"][0].tolist(), outputs(model, batch)[0]
    exact, served = Session(path, exact=True).logits(ids), Session(path).logits(ids)
    assert exact.shape == wanted.shape and exact.dtype == torch.float32
    tight = 3e-4 if name.startswith("gemma3") else 1e-5  # llama.cpp looks its GELU up in a table of f16
    assert difference(exact, wanted) < {"f32": tight, "f16": 3e-3, "bf16": 3e-2}[dtype]
    # Beside the cache in f16, matrices in bf16 are multiplied by activations in bf16.
    assert difference(served, exact) < (2e-2 if dtype == "bf16" else 3e-3)


@runs
@pytest.mark.parametrize("name", ["llama", "uneven llama", "qwen3", "gemma3", "first attention gone"])
def test_greedy_tokens_are_the_models_own(tmp_path, name):
    model = MODELS[name]()
    session = Session(write_gguf(model, None, tmp_path / "model.gguf", dtype="f32"))
    prompt = inputs(model, batch=1, length=9)["input_ids"]
    options = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 9:]
    assert session.write(prompt[0].tolist(), 20).tokens == wanted.tolist()


@runs
def test_the_runtime_answers_as_the_task_does():
    model = make_uneven(tiny())
    prepared = prepare(model, Language(), "llama.cpp")
    for length in (12, 5, 600):  # the context grows
        batch = inputs(model, batch=3, length=length, padded=True)
        found, real = prepared(batch), batch["attention_mask"].bool()
        wanted = Language().forward(model, batch)
        assert found.shape == wanted.shape and not found[~real].any()
        assert difference(found[real], wanted[real]) < 5e-3
    assert prepared.details["dtype"] == "f16" and int(prepared.details["bytes"]) > 100_000
    assert "llama.cpp (cpu, dtype f16" in prepared.describe()


@runs
def test_the_temporary_folder_goes_with_the_runtime(monkeypatch, tmp_path):
    monkeypatch.setattr(llama_cpp_module, "TemporaryDirectory", in_folder(tmp_path))
    prepared = prepare(tiny(), Language(), "llama.cpp-q8_0")
    assert [path.name for path in tmp_path.glob("*/*")] == ["q8_0.gguf"]
    del prepared
    assert not list(tmp_path.iterdir())


def in_folder(folder: Any) -> Any:
    from functools import partial
    from tempfile import TemporaryDirectory

    return partial(TemporaryDirectory, dir=folder)


@runs
def test_other_tasks_are_refused():
    task = Language()
    task.kind = "embedding"  # type: ignore[misc]
    with pytest.raises(LeanError, match="runs causal language models, and task words is of the kind embedding"):
        prepare(tiny(), task, "llama.cpp")


@runs
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_files_run(tmp_path, kind):
    model = tiny(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)
    model = apply(model, DropLayers(keep=(0, 1)))
    whole = write_gguf(model, None, tmp_path / "model.gguf")
    small = quantize_gguf(whole, tmp_path / "small.gguf", kind)
    bits = 8 * small.stat().st_size / sum(p.numel() for p in model.parameters())
    assert bits < {"q8_0": 9.2, "q6_k": 7.6, "q5_k_m": 6.9, "q4_k_m": 6.2}[kind]
    batch = inputs(model, batch=1, length=23)
    found, wanted = Session(small).logits(batch["input_ids"][0].tolist()), outputs(model, batch)[0]
    assert difference(found, wanted) < (0.05 if kind == "q8_0" else 0.4)
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "small.gguf"}
    with pytest.raises(LeanError, match="is quantised already"):
        quantize_gguf(small, tmp_path / "twice.gguf", kind)


@runs
def test_uneven_layers_are_quantised_too(tmp_path):
    model = make_uneven(tiny())
    small = quantize_gguf(write_gguf(model, None, tmp_path / "model.gguf"), tmp_path / "small.gguf", "q8_0")
    batch = inputs(model, batch=1, length=23)
    assert difference(Session(small).logits(batch["input_ids"][0].tolist()), outputs(model, batch)[0]) < 0.05


@runs
def test_rates(tmp_path):
    path = write_gguf(tiny(), None, tmp_path / "model.gguf")
    found = rates(path, [[5, 6, 7], [8, 9, 10, 11]], 4)
    assert set(found) == {"prefill", "decode"} and all(rate > 0 for rate in found.values())
    with pytest.raises(LeanError, match="Rates need prompts"):
        rates(path, [[]], 4)


@runs
def test_a_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"no")
    with pytest.raises(LeanError, match=r"cannot open .*no\.gguf"):
        Session(tmp_path / "no.gguf")
    session = Session(write_gguf(tiny(), None, tmp_path / "model.gguf"))
    with pytest.raises(LeanError, match="give ids below 96"):
        session.logits([1, 96])
    with pytest.raises(LeanError, match="a text without tokens"):
        session.logits([])


@runs
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("first", [False, True])
def test_text_is_split_as_the_tokenizer_splits_it(tmp_path, rule, first):
    tokenizer = tokenizer_of(rule, first=first)
    session = Session(write_gguf(tiny(vocab_size=2000), tokenizer, tmp_path / "model.gguf"))
    for text in [*OTHER, "<|start|>user\nhi<|end|>", "  12  345 6", "don't DON'T 'Tis\r\n\r\n x"]:
        assert session.tokenize(text) == tokenizer(text)["input_ids"], text


@runs
def test_a_trimmed_tokenizer_splits_as_before(tmp_path):
    model, tokenizer = tiny(vocab_size=2000, pad_token_id=0, bos_token_id=1, eos_token_id=0), tokenizer_of()
    keep = choose(count(tokenizer, OTHER[:80]), tokenizer)
    small = trim(tokenizer, keep)
    apply(model, KeepVocabulary(size=len(keep)), keep=torch.as_tensor(keep))
    session = Session(write_gguf(model, small, tmp_path / "model.gguf"))
    for text in OTHER:
        assert session.tokenize(text) == small(text)["input_ids"], text
