"""The identities of the card axformer."""

from __future__ import annotations

import copy
import itertools
import logging

import pytest
import torch
from subjects import BOTH, decoder, encoder, outputs

from families import TINY, inputs
from families import outputs as outputs_of
from leanformers.errors import LeanError
from leanformers.methods import Subject, get
from leanformers.methods.compress.axformer import AxFormer, Search
from leanformers.methods.switches import LowerLayers, Switches
from leanformers.surgery import DropSublayers, KeepHeads, KeepNeurons, SwapAttention, ledger

LOOSE = {"k": 4, "neuron_group": 16, "agreement": 0.0, "factor": 1e9}  # accepts whatever lowers the mean


def spread(make):
    """Weights large enough for parts to matter."""
    return make(initializer_range=0.3)


def searched(make, **settings):
    subject = spread(make)
    search = Search(subject, AxFormer(**{**LOOSE, **settings}))
    with search.hooked():
        search.run()
    return subject, search


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_nothing_accepted_leaves_the_model_as_it_was(make):
    subject = spread(make)
    get("axformer").build({**LOOSE, "agreement": 1.0})(subject)
    assert subject.notes["axformer"]["accepted"] == [] and subject.notes["axformer"]["passes"] > 12
    assert torch.equal(outputs(subject), outputs(spread(make)))
    assert ledger(subject.model) == () and subject.model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in subject.model.modules())


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_what_is_decided_is_what_the_edits_compute_and_the_loss_falls_along_the_log(make):
    subject, search = searched(make)
    losses = [search.notes()["loss_before"], *(one["loss"] for one in search.log)]
    assert len(losses) > 3 and all(a > b for a, b in itertools.pairwise(losses))
    with search.hooked():
        for switches in search.switches.layers:  # mixers went with the first `hooked`
            for switch in switches.values():
                if switch.mixed:
                    switch.mix(*switch.mixed)
        masked = outputs(subject)
    before = subject.anatomy.parameters()
    search.switches.apply(subject)
    assert subject.anatomy.parameters() < before
    torch.testing.assert_close(outputs(subject), masked, rtol=1e-4, atol=1e-4)
    after = Search(subject, AxFormer(k=None)).losses(0).mean()
    assert float(after) == pytest.approx(search.lowest, rel=1e-5)


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_replaying_the_log_gives_its_losses(make):
    _, search = searched(make)
    again = Search(spread(make), AxFormer(**LOOSE))
    with again.hooked():
        found = again.replay(search.log)
    assert found == pytest.approx([one["loss"] for one in search.log], rel=1e-6)


def test_both_conditions_of_the_rule(monkeypatch):
    search = Search(encoder(), AxFormer(agreement=0.5, k=None))
    search.base, search.lowest = torch.tensor([1.0, 1.0, 1.0, 1.0]), 0.9
    cases = [
        ([0.5, 0.5, 0.5, 1.9], True, 0.85),  # lower mean, three no worse than at first
        ([0.2, 0.2, 1.1, 1.1], False, 0.65),  # lower mean, but two of four is not more than half
        ([0.9, 1.0, 1.0, 0.5], False, 0.85),  # everyone no worse than at first, but no new lowest
        ([1.0, 1.0, 1.0, 0.0], True, 0.75),  # as good as at first counts, not as good as now
    ]
    for losses, accepted, loss in cases:
        monkeypatch.setattr(search, "losses", lambda index, losses=losses: torch.tensor(losses))
        assert search.attempt(0, "attention", "members", [0]) == (accepted, pytest.approx(loss))
        assert search.switches.layers[0]["attention"].members == ({0} if accepted else set())
        search.switches.layers[0]["attention"].members = set()


def test_the_order_and_the_hierarchy(monkeypatch):
    search = Search(encoder(), AxFormer(k=4, neuron_group=16, factor=1.1))
    tried = []

    def attempt(index, name, what, members=()):
        tried.append((index, name, what, tuple(members)))
        far = (index, name) == (1, "feed_forward")
        return False, 2.0 if far else 1.05

    monkeypatch.setattr(search, "attempt", attempt)
    monkeypatch.setattr(search, "losses", lambda index: torch.ones(60))
    search.run()
    whole = [(index, name) for index, name, what, _ in tried if what == "gone"]
    assert [entry[:3] for entry in tried[:3]] == [(index, "attention", "hard") for index in range(3)]
    assert whole == [(i, name) for i in (2, 1, 0) for name in ("feed_forward", "attention")]
    groups = [members for index, name, _, members in tried if (index, name) == (2, "feed_forward") and members]
    assert groups == [tuple(range(start, start + 16)) for start in (0, 16, 32, 48)]
    heads = [members for index, name, _, members in tried if (index, name) == (0, "attention") and members]
    assert heads == [(0,), (1,), (2,), (3,)]
    assert not any(members for index, name, _, members in tried if (index, name) == (1, "feed_forward"))


def test_one_part_is_always_left():
    subject = encoder(initializer_range=1e-3)
    search = Search(subject, AxFormer(**LOOSE))
    search.attempt = lambda index, name, what, members=(): _take(search, index, name, what, members)
    with search.hooked():
        search.run()
    assert search.switches.standing == 1
    search.switches.apply(subject)
    assert outputs(subject).isfinite().all()
    search = Search(encoder(), AxFormer(**LOOSE))
    search.attempt = lambda index, name, what, members=(): _take(search, index, name, what, members, whole=False)
    with search.hooked():
        search.run()
    assert {switch.size - len(switch.members) for layer in search.switches.layers for switch in layer.values()} == {
        1,
        16,
    }


def _take(search, index, name, what, members, *, whole=True):
    """Everything is accepted, whole sub-layers only if asked."""
    switch = search.switches.layers[index][name]
    if what == "gone" and whole:
        switch.gone = True
    if what == "members":
        switch.members |= set(members)
    return what != "gone" or whole, 0.0


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma3", "t5", "bart", "opt-post-norm", "dinov2"])
def test_layers_that_stand_in_change_nothing(family):
    model = TINY[family]()
    anatomy = Subject(model=model).anatomy
    batch = inputs(model, padded=True)
    whole = outputs_of(model, batch)
    for index in range(len(anatomy.layers)):
        lower, switches = LowerLayers(anatomy, index), Switches(anatomy)
        for _ in range(2):
            with lower.standing_in(0):
                assert torch.equal(outputs_of(model, batch), whole)
        switch = next(iter(switches.layers[index].values()))
        switch.gone = True
        with switches.hooked():
            expected = outputs_of(model, batch)
            with lower.standing_in(0):
                assert torch.equal(outputs_of(model, batch), expected)
        assert not torch.equal(expected, whole)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma3", "t5", "bart", "whisper", "dinov2", "mpnet"])
def test_switches_and_edits_agree(family):
    model = TINY[family]()
    subject = Subject(model=model)
    switches = Switches(subject.anatomy)
    for index, layer in enumerate(switches.layers):
        name = list(layer)[index % len(layer)]
        for other, switch in layer.items():
            switch.gone = other == name
            if not switch.gone and not (family in ("t5", "mpnet") and other != "feed_forward"):
                switch.members = {1}
    batch = inputs(model, padded=True)
    with switches.hooked():
        masked = outputs_of(model, batch)
    switches.apply(subject)
    assert {type(edit) for edit in ledger(model)} <= {DropSublayers, KeepHeads, KeepNeurons}
    torch.testing.assert_close(outputs_of(model, batch), masked, rtol=1e-4, atol=1e-4)


def test_padding_changes_no_loss():
    subject = spread(decoder)
    for layer in subject.anatomy.layers:
        subject.apply(SwapAttention(path=layer.attention.path, mixer="top_k", settings={"k": 3}))
    padded = Search(subject, AxFormer(k=None)).losses(0)
    rows = copy.copy(subject.task)
    rows.batch_size = 1
    subject.task = rows
    torch.testing.assert_close(Search(subject, AxFormer(k=None)).losses(0), padded, rtol=1e-5, atol=1e-5)


def test_few_rows_are_warned_of_and_limits_kept(caplog):
    with caplog.at_level(logging.WARNING):
        subject = encoder()
        get("axformer").build({**get("axformer").starts()[0], "samples": 12})(subject)
    assert subject.notes["axformer"]["rows"] == 12 and "12 validation rows" in caplog.text
    assert subject.notes["axformer"]["passes"] <= 7


def test_a_loss_that_is_no_number_is_not_searched_in_silence():
    subject = encoder()
    with torch.no_grad():
        subject.model.classifier.weight.fill_(float("inf"))
    with pytest.raises(LeanError, match="not finite on 20 of 20 validation rows"):
        get("axformer").build(LOOSE)(subject)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


def test_what_cannot_be_searched_is_refused():
    info, subject = get("axformer"), encoder()
    subject.task.splits["validation"] = []
    assert "none; split some off" in info.unsuitable(subject.anatomy, subject.task)
    mpnet = Subject(model=TINY["mpnet"]()).anatomy
    assert "set k to null" in info.unsuitable(mpnet, None)
    assert info.unsuitable(mpnet, None, {"k": None}) is None
