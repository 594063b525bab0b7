"""The identities of the card obert."""

from __future__ import annotations

import pytest
import torch
from subjects import EVERY, encoder, outputs

from leanformers.errors import LeanError
from leanformers.methods import get
from leanformers.methods.pruning import prunable
from leanformers.parts import MaskedLinear
from leanformers.surgery import ledger

QUICK = {"gradients": 12, "gradient_batch": 4}


def pruned(make=encoder, **settings):
    subject = make()
    get("obert").build({**QUICK, **settings})(subject)
    return subject


def masks(subject) -> dict[str, torch.Tensor]:
    return {path: subject.anatomy.module(path).mask for path, _ in prunable(subject.anatomy)}


def weights(subject) -> dict[str, torch.Tensor]:
    return {path: weight.detach() for path, weight in prunable(subject.anatomy)}


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_no_sparsity_changes_nothing(make):
    before, after = make().model.state_dict(), pruned(make, sparsity=0.0).model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("sparsity", [0.13, 0.6])
def test_exactly_the_asked_share_is_zero(make, sparsity):
    subject = pruned(make, sparsity=sparsity)
    found = masks(subject)
    assert sum(int((~m).sum()) for m in found.values()) == round(sparsity * sum(m.numel() for m in found.values()))
    assert all((weights(subject)[path][~mask] == 0).all() for path, mask in found.items())


def test_ties_are_counted_exactly():
    subject = encoder()
    with torch.no_grad():
        for _, weight in prunable(subject.anatomy):
            weight.copy_(weight.sign() * 0.02)
    get("obert").build({**QUICK, "sparsity": 0.4, "damp": 1e3})(subject)
    found = masks(subject)
    assert sum(int((~m).sum()) for m in found.values()) == round(0.4 * sum(m.numel() for m in found.values()))


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_a_large_damp_is_global_magnitude(make):
    subject, magnitude = pruned(make, damp=1e6, sparsity=0.5), make()
    get("essential-sparsity").build({"sparsity": 0.5})(magnitude)
    for path, mask in masks(magnitude).items():
        assert torch.equal(mask, masks(subject)[path])
        torch.testing.assert_close(weights(subject)[path], weights(magnitude)[path], rtol=0, atol=1e-7)


def test_a_diagonal_fisher_moves_no_survivor_and_a_block_does():
    before = weights(encoder())
    for block, moves in ((1, False), (16, True)):
        subject = pruned(block_size=block, sparsity=0.5)
        moved = [not torch.equal(weights(subject)[path][m], before[path][m]) for path, m in masks(subject).items()]
        assert any(moved) == moves
    still = pruned(sparsity=0.5, compensate=False)
    assert all(torch.equal(weights(still)[path][m], before[path][m]) for path, m in masks(still).items())


def test_masks_are_nested_over_steps_and_sub_steps():
    subject = pruned(sparsity=0.3)
    before = masks(subject)
    edits = len(ledger(subject.model))
    get("obert").build({**QUICK, "sparsity": 0.6, "recomputations": 3})(subject)
    assert len(ledger(subject.model)) == edits == len(before)
    after = masks(subject)
    assert all((before[path] | ~mask).all() for path, mask in after.items())
    assert sum(int((~m).sum()) for m in after.values()) == round(0.6 * sum(m.numel() for m in after.values()))


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_groups_of_four_inputs_go_together(make):
    subject = pruned(make, pattern="4-block", sparsity=0.5)
    for path, mask in masks(subject).items():
        grouped = mask.view(mask.shape[0], -1, 4)
        assert (grouped == grouped[..., :1]).all(), path
    found = masks(subject)
    assert sum(int((~m).sum()) for m in found.values()) == 4 * round(0.125 * sum(m.numel() for m in found.values()))


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_taking_turns_for_memory_changes_nothing(make):
    whole, turns = pruned(make, sparsity=0.5), pruned(make, sparsity=0.5, memory=0.0008)
    assert whole.notes["fisher"]["passes"] == 1 < turns.notes["fisher"]["passes"]
    for path, weight in weights(whole).items():
        assert torch.equal(weight, weights(turns)[path]), path


def test_too_little_memory_is_refused_before_any_gradient():
    with pytest.raises(LeanError, match=r"lower block_size \(50; 1 takes"):
        pruned(sparsity=0.5, memory=1e-6)


def test_gradual_pruning_follows_the_schedule_and_keeps_zeros(tmp_path):
    settings = {"sparsity": 0.8, "initial_sparsity": 0.4, "steps": 3, "cycle_epochs": 0.5, "dense_epochs": 0.25}
    method = get("obert").build({**QUICK, **settings, "learning_rate": 1e-2, "batch_size": 8})
    assert method._targets() == pytest.approx([0.4, 0.8 - 0.4 / 8, 0.8])
    subject = encoder()
    seen = []
    train = subject.train
    subject.train = lambda *args, **options: (seen.append(masks_or_none(subject)), train(*args, **options))
    method(subject)
    assert subject.teacher is not None and subject.trained_examples > 0
    assert [s if s is None else round(s, 2) for s in seen] == [None, 0.4, 0.75, 0.8]
    found = masks(subject)
    assert all((weights(subject)[path][~mask] == 0).all() for path, mask in found.items())
    subject.model.save_pretrained(tmp_path)
    again = type(subject.model).from_pretrained(tmp_path).eval()
    for path, mask in found.items():
        part = again.bert.get_submodule(path)
        assert isinstance(part, MaskedLinear) and torch.equal(part.mask, mask) and (part.weight[~mask] == 0).all()
    before = outputs(subject)
    subject.model = again
    assert torch.equal(outputs(subject), before)


def masks_or_none(subject):
    found = [part for part in subject.model.modules() if isinstance(part, MaskedLinear)]
    if not found:
        return None
    return sum(int((~p.mask).sum()) for p in found) / sum(p.mask.numel() for p in found)


def test_the_seed_decides():
    assert all(torch.equal(a, b) for a, b in zip(*(weights(pruned()).values() for _ in range(2)), strict=True))


def test_half_precision_is_pruned_too():
    subject = encoder()
    subject.model.bfloat16()
    get("obert").build({**QUICK, "sparsity": 0.5})(subject)
    assert next(iter(weights(subject).values())).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pattern": "4-block", "block_size": 30}, ["multiple of 4", "not 30"]),
        ({"pattern": "4-block", "block_size": 20}, ["divides", "not 20"]),
        ({"steps": 3}, ["cycle_epochs", "recomputations"]),
    ],
)
def test_what_does_not_fit_is_refused(settings, words):
    subject = encoder()
    reason = get("obert").unsuitable(subject.anatomy, subject.task, settings)
    assert reason is not None and all(word in reason for word in words)


def test_single_zeros_and_int8_are_refused_where_they_do_not_fit():
    subject = pruned(sparsity=0.5)
    assert "single zeros" in get("obert").unsuitable(subject.anatomy, subject.task, {"pattern": "4-block"})
    with pytest.raises(LeanError, match="masked already"):
        get("obert").build({"sparsity": 0.3})(subject)
    subject = encoder()
    get("quantization").build({})(subject)
    assert get("obert").unsuitable(subject.anatomy, subject.task) is not None
