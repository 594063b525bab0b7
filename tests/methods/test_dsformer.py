"""The identities of the card dsformer; those of the part are in tests/parts/test_dense_sparse.py."""

from __future__ import annotations

import gc

import pytest
import torch
from safetensors.torch import load_file
from subjects import EVERY, encoder, outputs
from torch.multiprocessing.reductions import StorageWeakRef

from leanformers.errors import LeanError
from leanformers.methods import get
from leanformers.methods.compress.dsformer import Factoriser, rank_of
from leanformers.parts import DenseSparseLinear
from leanformers.parts.dense_sparse import dense_sparse_bits
from leanformers.parts.dictionary import factorise

SMALL = {"ratio": 1.5, "width": 16, "nonzeros": 2, "iterations": 3}
QUICK = {**SMALL, "epochs": 0.5, "limit": 32, "batch_size": 8}


def treated(make=encoder, **settings):
    subject = make()
    get("dsformer").build(settings)(subject)
    return subject


def parts(subject) -> dict[str, DenseSparseLinear]:
    found = {path: subject.anatomy.module(path) for path in subject.anatomy.roles}
    assert all(isinstance(part, DenseSparseLinear) for part in found.values())
    return found


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("settings", [{**SMALL, "epochs": 0.0}, QUICK], ids=["start", "trained"])
def test_saved_and_loaded_it_says_the_same_to_the_bit(make, settings, tmp_path):
    subject = treated(make, **settings)
    assert all(part.latent is None for part in parts(subject).values())
    expected = outputs(subject)
    subject.model.save_pretrained(tmp_path)
    subject.model = type(subject.model).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(subject), expected)
    stored = load_file(tmp_path / "model.safetensors")
    assert not any("latent" in name or "whole" in name for name in stored)


def test_bytes_on_disk_are_the_formula(tmp_path):
    subject = treated(**SMALL, epochs=0.0)
    subject.model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    dense = bits = 0
    for path, part in parts(subject).items():
        own = [t for n, t in stored.items() if f"{path}." in n and not n.endswith("bias")]
        assert len(own) == 3
        wanted = dense_sparse_bits(part.out_features, part.in_features, part.rank, part.width, part.nonzeros, 32)
        assert wanted <= sum(8 * t.numel() * t.element_size() for t in own) < wanted + 8
        dense, bits = dense + 32 * part.out_features * part.in_features, bits + wanted
    assert subject.notes["ratio"]["linears"] == pytest.approx(dense / bits) and dense / bits >= 1.5
    assert 1 < subject.notes["ratio"]["model"] < dense / bits
    saving = get("dsformer").build(SMALL).estimate(encoder().anatomy)
    assert saving.bytes == pytest.approx((bits - dense) / 8, abs=len(parts(subject)))
    assert saving.parameters == subject.anatomy.parameters() - encoder().anatomy.parameters() and saving.flops == 0


def test_biases_and_all_else_are_untouched_by_the_start():
    before, after = encoder().model.state_dict(), treated(**SMALL, epochs=0.0).model.state_dict()
    same = [name for name in after if name in before]
    assert len(same) > 20 and all(torch.equal(before[name], after[name]) for name in same)
    gone = set(before) - set(after)
    assert all(name.endswith("weight") for name in gone) and len(gone) == len(encoder().anatomy.roles)


def test_no_weight_outlives_its_factors(monkeypatch):
    subject, alive = encoder(), []
    weights = [subject.anatomy.module(path).weight for path in subject.anatomy.roles]
    dense = [StorageWeakRef(weight.untyped_storage()) for weight in weights]
    del weights

    def watched(*args, **options):
        alive.append(sum(not one.expired() for one in dense))
        return factorise(*args, **options)

    monkeypatch.setattr("leanformers.methods.compress.dsformer.factorise", watched)
    get("dsformer").build({**SMALL, "epochs": 0.0})(subject)
    gc.collect()
    assert all(one.expired() for one in dense)
    assert alive[-1] == 1, alive  # the one in hand


def test_factored_and_multiplied_out_agree():
    one, other = (treated(**SMALL, epochs=0.0, mode=mode) for mode in ("materialised", "factored"))
    torch.testing.assert_close(outputs(one), outputs(other), rtol=1e-4, atol=1e-5)
    flops = [subject.anatomy.layer_flops(16) for subject in (one, other, encoder())]
    assert flops[1] < flops[0] == flops[2]


def test_training_moves_the_pattern_only_when_it_may():
    start = {path: part.mask for path, part in parts(treated(**SMALL, epochs=0.0)).items()}
    fast = {**QUICK, "factor_learning_rate": 3e-2, "epochs": 3.0}
    free, fixed = treated(**fast), treated(**fast, straight_through=False)
    assert any(not torch.equal(part.mask, start[path]) for path, part in parts(free).items())
    assert all(torch.equal(part.mask, start[path]) for path, part in parts(fixed).items())
    for subject in (free, fixed):
        assert all((part.mask.sum(-1) == 2).all() for part in parts(subject).values())


def test_the_pattern_settles_and_its_changes_are_watched(monkeypatch):
    monkeypatch.setattr("leanformers.methods.compress.dsformer._WATCH", 2)
    seen = []
    after = Factoriser.after_step

    def watched(self, model, step, total):
        after(self, model, step, total)
        assert all((part.mask.sum(-1) == 2).all() for part in self.parts)
        seen.append((step / total, [part.mask.clone() for part in self.parts]))

    monkeypatch.setattr(Factoriser, "after_step", watched)
    subject = treated(**{**QUICK, "factor_learning_rate": 3e-2, "epochs": 4.0, "settled": 0.5})
    late = [masks for share, masks in seen if share >= 0.5]
    assert len(late) > 4
    assert all(torch.equal(a, b) for masks in late[1:] for a, b in zip(late[0], masks, strict=True))
    changes = subject.notes["pattern_changes"]
    assert changes[3] > 0 and changes[max(changes)] == 0


def test_distillation_learns_from_the_model_as_it_came():
    subject = treated(**QUICK, distil=True)
    assert subject.teacher is not None and all(part.latent is None for part in parts(subject).values())


def test_an_interrupted_training_leaves_a_whole_model(monkeypatch):
    def stop(self, model, step, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(Factoriser, "after_step", stop)
    subject = encoder()
    with pytest.raises(KeyboardInterrupt):
        get("dsformer").build(QUICK)(subject)
    assert all(part.latent is None for part in parts(subject).values())


@pytest.mark.parametrize(("out", "into"), [(384, 384), (1536, 384), (384, 1536), (768, 768)])
@pytest.mark.parametrize("ratio", [2.0, 2.8, 3.57])
def test_the_rank_uses_the_budget(out, into, ratio):
    rank = rank_of(ratio, out, into, 32, 4, 32)
    assert dense_sparse_bits(out, into, rank, 32, 4, 32) <= 32 * out * into / ratio
    more = dense_sparse_bits(out, into, rank + 1, 32, 4, 32)
    assert rank == out or more > 32 * out * into / ratio
    if (out, into, ratio) == (768, 768, 2.8):
        assert rank == 154  # the card's own example


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 5}, ["blocks of 5", "set another width"]),
        ({"width": 8, "ratio": 20.0}, ["at a ratio of 20.0", "lower ratio"]),
        ({"roles": ("gate",)}, ["no linears"]),
    ],
)
def test_what_does_not_fit_is_refused(settings, words):
    subject = encoder()
    reason = get("dsformer").unsuitable(subject.anatomy, subject.task, {**SMALL, **settings})
    assert reason is not None and all(word in reason for word in words)


@pytest.mark.parametrize("first", ["greenformers", "quantization", "essential-sparsity", "dsformer"])
def test_linears_that_are_edited_already_are_refused(first):
    subject = encoder()
    get(first).build({**SMALL, "epochs": 0.0} if first == "dsformer" else {})(subject)
    with pytest.raises(LeanError, match="factorise plain linears"):
        get("dsformer").build({**SMALL, "epochs": 0.0})(subject)
