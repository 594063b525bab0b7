"""The rotated residual stream: another basis at each position changes nothing, and slicing it loads and composes."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import transformers as T

from families import TINY, family, inputs, outputs
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.surgery import (
    FactoriseLinear,
    KeepHeads,
    KeepNeurons,
    KeepVocabulary,
    MaskWeights,
    QuantiseEmbeddings,
    QuantiseLinear,
    SliceResidual,
    apply,
    rotation,
    tier,
)
from leanformers.surgery.rotation import centred, steps

ROTATED = ("gpt2", "gpt-neox", "gpt-neox-sequential", "opt", "llama", "llama-ungrouped", "mistral", "qwen3", "phi3")
IMAGES = ("vit", "deit")
CASES = [(name, head) for name in (*ROTATED, *IMAGES) for head in TINY[name].heads]


def rotations(model: Any, size: int, seed: int = 0) -> list[torch.Tensor]:
    """Random orthonormal columns for every position."""
    anatomy, random = Anatomy.of(model), torch.Generator().manual_seed(seed)
    shape = (anatomy.hidden_size, anatomy.hidden_size)
    count = 1 + len(list(steps(anatomy)))
    return [
        torch.linalg.qr(torch.randn(shape, generator=random, dtype=torch.float64)).Q[:, :size] for _ in range(count)
    ]


def rotated(name: str, size: int = 24, **options: Any) -> Any:
    model = TINY[name](**options)
    return apply(model, SliceResidual(size=size, rotated=True), rotations=rotations(model, size))


@pytest.mark.parametrize(("name", "head"), CASES)
def test_any_rotation_of_the_whole_width_changes_nothing(name, head):
    model, turned = TINY[name](head=head), rotated(name, 32, head=head)
    batch = inputs(model, padded=True)
    expected = outputs(model, batch)
    scale = expected.abs().max()
    assert (outputs(turned, batch) - expected).abs().max() <= 1e-4 * scale
    anatomy = Anatomy.of(turned)
    assert anatomy.residual.rotated and not anatomy.tied
    assert anatomy.hidden_size == 32


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tables_and_heads_are_turned_some_rows_at_a_time(name, monkeypatch):
    whole = rotated(name)
    rows = []
    monkeypatch.setattr(rotation, "_ROWS", 10)
    monkeypatch.setattr(rotation, "centred", lambda data, norm: rows.append(data) or centred(data, norm))
    for before, after in zip(whole.parameters(), rotated(name).parameters(), strict=True):
        torch.testing.assert_close(after, before)
    assert rows[0].dtype == torch.float64 and len(rows[0]) == 10  # of the token table


@pytest.mark.parametrize("name", (*ROTATED, *IMAGES))
def test_gradients_of_what_stays_agree_too(name):
    model, turned = TINY[name](), rotated(name, 32)
    batch = inputs(model)
    for one in (model, turned):
        one(**batch).logits.square().mean().backward()
    whole, places = Anatomy.of(model), len(list(steps(Anatomy.of(model))))
    basis = rotations(model, 32)[1 + places // 3 * 2 - 1].float()  # behind the second of three layers
    ours, theirs = (Anatomy.of(one).layers[1].feed_forward.down for one in (turned, model))
    mine, gradient = (
        one.module.weight.grad.t() if one.transposed else one.module.weight.grad for one in (ours, theirs)
    )
    back = centred((basis @ mine).t(), whole.norms[0]).t()
    torch.testing.assert_close(back, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize(("name", "head"), CASES)
def test_a_sliced_model_reloads_to_the_bit(name, head, tmp_path):
    model = TINY[name](head=head)
    edit = SliceResidual(size=24, rotated=True)
    before = Anatomy.of(model)
    count, flops, cost = before.parameters(), before.flops(7), edit.cost(before)
    apply(model, edit, rotations=rotations(model, 24))
    after = Anatomy.of(model)
    assert after.parameters() - count == cost.parameters
    assert after.flops(7) - flops == cost.flops(7)
    assert tier(model) == "lean"
    model.save_pretrained(tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "a").eval()
    batch = inputs(model, padded=True)
    assert torch.equal(outputs(again, batch), outputs(model, batch))
    again.save_pretrained(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_the_base_model_loads_from_the_folder_of_the_whole(tmp_path):
    model = rotated("llama")
    model.save_pretrained(tmp_path)
    base = T.AutoModel.from_pretrained(tmp_path).eval()
    batch = inputs(model)
    with torch.no_grad():
        assert torch.equal(base(**batch).last_hidden_state, model.model(**batch).last_hidden_state)


@pytest.mark.parametrize("name", ROTATED)
def test_padding_and_cache_change_nothing(name):
    model = rotated(name)
    batch = inputs(model, padded=True)
    real = int(batch["attention_mask"][1].sum())
    alone = outputs(model, {"input_ids": batch["input_ids"][1:, :real]})
    torch.testing.assert_close(outputs(model, batch)[1, :real], alone[0], rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids = batch["input_ids"][:1]
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))


@pytest.mark.parametrize("name", ROTATED)
def test_a_tied_head_gets_a_weight_of_its_own(name, tmp_path):
    model = TINY[name](tie_word_embeddings=True)
    model.tie_weights()
    batch = inputs(model)
    expected = outputs(model, batch)
    turned = apply(model, SliceResidual(size=32, rotated=True), rotations=rotations(model, 32))
    assert not Anatomy.of(turned).tied and turned.config.tie_word_embeddings is False
    torch.testing.assert_close(outputs(turned, batch), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    turned.tie_weights()
    turned.save_pretrained(tmp_path)
    again = type(turned).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again, batch), outputs(turned, batch))


@pytest.mark.parametrize("name", ROTATED)
def test_other_edits_follow(name, tmp_path):
    pytest.importorskip("torchao")
    model = rotated(name)
    anatomy = Anatomy.of(model)
    first, last = anatomy.layers[0], anatomy.layers[-1]
    groups = first.attention.num_key_value_heads
    edits = [
        (KeepHeads(path=first.attention.path, size=groups - 1), {"keep": torch.arange(groups - 1)}),
        (KeepNeurons(path=first.feed_forward.path, size=40), {"keep": torch.arange(40)}),
        (FactoriseLinear(path=last.attention.output.path, rank=8), {}),
        (MaskWeights(path=last.feed_forward.up.path), {"mask": torch.rand(last.feed_forward.up.weight().shape) > 0.5}),
        (QuantiseLinear(path=last.feed_forward.down.path), {}),
        (KeepVocabulary(size=64), {"keep": torch.arange(64)}),
        (QuantiseEmbeddings(), {}),
    ]
    if last.feed_forward.up.fused:  # gate and up are one linear
        weight = last.feed_forward.up.module.weight
        edits[3] = (MaskWeights(path=last.feed_forward.up.path), {"mask": torch.rand(weight.shape) > 0.5})
    for edit, tensors in edits:
        before = Anatomy.of(model)
        count, cost = before.parameters(), edit.cost(before)
        apply(model, edit, **tensors)
        assert Anatomy.of(model).parameters() - count == cost.parameters, edit
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    batch = {"input_ids": inputs(model)["input_ids"] % 64}
    assert torch.equal(outputs(again, batch), outputs(model, batch))


def test_copies_pickles_threads_and_checkpointing(tmp_path):
    model = rotated("llama")
    batch = inputs(model)
    expected = outputs(model, batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.shortcut.weight.zero_()
    assert torch.equal(outputs(twin, batch), expected) and not torch.equal(outputs(model, batch), expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(twin.model.layers)) and twin, batch), expected)
    assert all(not layer.mlp.down_proj.carrier.held for layer in twin.model.layers)

    batches = [inputs(twin, seed=seed) for seed in range(4)]
    alone, found = [outputs(twin, one) for one in batches], {}

    def work(index: int) -> None:
        for _ in range(10):
            found[index] = outputs(twin, batches[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, one in enumerate(alone):
        torch.testing.assert_close(found[index], one)

    plain = torch.autograd.grad(twin(**batch).logits.sum(), twin.model.embed_tokens.weight)[0]
    twin.gradient_checkpointing_enable()
    twin.train()
    again = torch.autograd.grad(twin(**batch).logits.sum(), twin.model.embed_tokens.weight)[0]
    torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt-neox"])
def test_dropout_falls_on_no_shortcut(name):
    """With the embeddings' and attention's own dropout at 0, nothing random is left in training mode."""
    fields = {"gpt2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0}, "gpt-neox": {"hidden_dropout": 0.5}, "opt": {}}[name]
    model = rotated(name, **fields)
    batch = inputs(model)
    expected = outputs(model, batch)
    model.train()
    if name == "gpt-neox":
        model.gpt_neox.emb_dropout.p = 0.0  # the same field sets the embeddings'
    assert torch.equal(outputs(model, batch), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_compile_gives_the_same_outputs(name):
    model = rotated(name)
    batch = inputs(model)
    with torch.inference_mode():
        compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_export_gives_the_same_outputs(name):
    exporters = pytest.importorskip("transformers.exporters")
    model = rotated(name)
    model.config.use_cache = False
    ids = inputs(model)["input_ids"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        exported = exporters.DynamoExporter().export(model, batch, exporters.DynamoConfig(dynamic=True))
        output = getattr(exported, "program", exported).module()(**batch)
    logits = output["logits"] if isinstance(output, dict) else output.logits
    torch.testing.assert_close(logits, outputs(model, batch))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bert", "norms the stream itself"),
        ("opt-post-norm", "norms the stream itself"),
        ("gemma3", "rescales single dimensions"),
        ("dinov2", "whole width|rescales"),
        ("t5", "an encoder and a decoder"),
        ("whisper", "an encoder and a decoder"),
        ("wav2vec2-stable", "whole width|mixes|cannot be rotated"),
    ],
)
def test_streams_that_cannot_be_rotated_are_refused(name, words):
    model = TINY[name]()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LeanError, match=words):
        apply(model, SliceResidual(size=24, rotated=True), rotations=[])
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_refusals_say_what_to_do():
    base = TINY["llama"](head="base")
    with pytest.raises(LeanError, match="load it with one"):
        apply(base, SliceResidual(size=24, rotated=True), rotations=rotations(base, 24))
    model = TINY["llama"]()
    with pytest.raises(LeanError, match="needs rotations="):
        apply(model, SliceResidual(size=24, rotated=True))
    with pytest.raises(LeanError, match="Cannot keep 40 of 32"):
        apply(model, SliceResidual(size=40, rotated=True), rotations=[])
    factorised = apply(TINY["llama"](), FactoriseLinear(path="layers.0.mlp.up_proj", rank=4))
    with pytest.raises(LeanError, match="LowRankLinear; rotate before"):
        apply(factorised, SliceResidual(size=24, rotated=True), rotations=[])
    done = rotated("llama")
    for more in (SliceResidual(size=16, rotated=True), SliceResidual(size=16)):
        with pytest.raises(LeanError, match="once"):
            apply(done, more, keep=torch.arange(16), rotations=[])


def test_the_cases_are_all_families_that_can_be_rotated():
    assert {name for name in TINY if family(name).rms_norm and len(family(name).stacks) == 1} - {"gemma3"} < set(
        ROTATED
    )
