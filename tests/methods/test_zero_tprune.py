"""Zero-TPrune: the schedule, the share of FLOPs, the identities of the card on whole models, refusals."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers as T
from subjects import decoder, encoder
from subjects import outputs as answers

from families import TINY, inputs, outputs
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.execute import execute
from leanformers.methods import get
from leanformers.methods.run.zero_tprune import ZeroTPrune, distance, drawn, stretched
from leanformers.parts.token_reducers import reduction
from leanformers.surgery import ReduceTokens, apply, ledger

IMAGES = ("vit", "deit", "dinov2", "audio-spectrogram-transformer")


@cache
def deit_s() -> Anatomy:
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
    with torch.device("meta"):
        return Anatomy.of(T.ViTForImageClassification(T.ViTConfig(**sizes)))


def larger(family: str):
    """A tiny model of six layers and enough tokens for a share of its FLOPs to go."""
    fields = {"num_mel_bins": 64} if family.startswith("audio") else {"image_size": 64}
    return TINY[family](num_hidden_layers=6, **fields)


def pruned(family: str, **settings):
    model = larger(family)
    edit = ZeroTPrune(**{"flops": 0.7, **settings})._edit(Anatomy.of(model))
    return apply(model, edit).eval(), edit


def test_the_schedule_is_the_authors_at_their_depth():
    found = stretched(12)
    assert found.layers == (0, 2, 5, 8, 10) and found.votes == (30, 5, 5, 1, 1)
    settings = found.settings(1.0, 197)
    assert settings["keep"] == [1.0, 0.9, 0.8, 0.7, 1.0] and settings["drop"] == [10] * 5
    for layers in range(2, 49):
        found = stretched(layers)
        assert list(found.layers) == sorted(set(found.layers)) and found.layers[0] >= 0
        assert found.layers[-1] <= layers - 2 and len(found.votes) == len(found.cuts) == len(found.layers)


@pytest.mark.parametrize("share", [0.87, 0.65, 0.5])
def test_the_share_is_met_and_scoring_costs_little(share):
    """DeiT-S: 12 blocks, 197 tokens, 4.5 G multiply-adds in its layers."""
    anatomy, method = deit_s(), ZeroTPrune(flops=share)
    assert method.tokens(anatomy) == 197
    whole = anatomy.layer_flops(197)
    assert whole == 2 * 12 * (12 * 197 * 384**2 + 2 * 197**2 * 384)
    edit = method._edit(anatomy)
    saving = edit.cost(anatomy).flops(197)
    assert share - 0.01 < 1 + saving / whole <= share
    assert method.estimate(anatomy).flops == saving and method.estimate(anatomy).parameters == 0
    rule = edit._reduction(anatomy).rule
    scoring, now = 0, 197
    for place in range(len(edit.layers)):
        scoring += rule.flops(place, now, 6, 384)
        now = rule.count(place, now, 197)
    assert scoring / whole < 0.03


def test_the_whole_share_is_the_model_to_the_bit():
    for family in IMAGES:
        model, _ = pruned(family, flops=1.0)
        batch = inputs(model)
        assert torch.equal(outputs(model, batch), outputs(larger(family), batch))
        assert reduction(model).left == {}
    subject = encoder()
    done = execute([{"method": "zero-tprune", "flops": 1.0}], subject)
    assert torch.equal(answers(done), answers(encoder()))


@pytest.mark.parametrize("family", IMAGES)
def test_images_are_pruned_by_the_schedule_each_alone(family):
    model, edit = pruned(family)
    batch = inputs(model, batch=3)
    together = outputs(model, batch)
    tokens = ZeroTPrune().tokens(Anatomy.of(model))
    rule, now = reduction(model).rule, tokens
    assert len(reduction(model).left) == len(edit.layers)
    for place, left in sorted(reduction(model).left.items()):
        assert left.length == now
        now = rule.count(place, now, tokens)
        assert left.counts == now == left.index.shape[1]
        front = torch.arange(rule.specials)
        assert torch.equal(left.index[:, : rule.specials], front.expand(3, -1))
    alone = [outputs(model, {name: tensor[i : i + 1] for name, tensor in batch.items()}) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, outputs(larger(family), batch), atol=1e-3)


def test_a_text_keeps_its_first_and_its_last_token():
    subject = encoder()
    model = subject.model
    get("zero-tprune").build({"flops": 0.8, "length": 48})(subject)
    mask = torch.arange(20)[None] < torch.tensor([20, 9, 4])[:, None]
    batch = {"input_ids": torch.randint(5, 60, (3, 20)) * mask, "attention_mask": mask.long()}
    together = outputs(model, batch)
    first = reduction(model).left[0]
    for row, count in enumerate((20, 9, 4)):
        kept = first.index[row][first.real[row]].tolist()
        assert kept[0] == 0 and kept[-1] == count - 1 and len(kept) == int(first.counts[row])
        one = {name: tensor[row : row + 1, :count] for name, tensor in batch.items()}
        torch.testing.assert_close(together[row : row + 1], outputs(model, one), rtol=1e-4, atol=1e-5)


def test_trials_keep_the_schedule_nearest_to_the_model():
    step = {"method": "zero-tprune", "flops": 0.8, "length": 48, "trials": 4, "samples": 8}
    one, again = (execute([step], encoder(initializer_range=0.2)) for _ in range(2))
    assert one.notes["zero-tprune"] == again.notes["zero-tprune"]
    made = ledger(one.model)[0]
    assert isinstance(made, ReduceTokens) and made.layers == (0, 1)
    assert {name: value for name, value in one.notes["zero-tprune"].items() if name != "layers"} == made.settings
    assert one.anatomy.layer_flops(48) <= 0.8 * encoder().anatomy.layer_flops(48)


def test_drawn_schedules_leave_most_places_alone():
    import random

    for seed in range(20):
        found = drawn(12, random.Random(seed))
        assert found.layers == tuple(range(11))
        assert 1 <= sum(cut > 0 for cut in found.cuts) <= 5


def test_distance():
    whole = torch.randn(4, 3)
    assert distance(whole, whole) == pytest.approx(0.0, abs=1e-6) and distance(whole.flip(1), whole) > 0
    assert distance(torch.zeros(2, 1), torch.full((2, 1), 3.0)) == 9.0


def refused(model, task=None, **settings):
    return get("zero-tprune").unsuitable(Anatomy.of(model), task, settings)


@pytest.mark.parametrize("family", TINY)
def test_every_family_is_taken_or_refused_in_one_sentence(family):
    reason = refused(TINY[family](), flops=0.9)
    assert reason is None or "\n" not in reason


def test_what_does_not_suit_is_named():
    from types import SimpleNamespace

    assert "decodes" in refused(decoder().model)
    assert "answers for every token" in refused(TINY["bert"](head="lm"))
    assert "mean of all its tokens" in refused(TINY["bert"](), SimpleNamespace(kind="embedding"))
    assert "one layer" in refused(TINY["vit"](num_hidden_layers=1))
    assert "need calibration data" in refused(larger("vit"), trials=3)
    assert "leaves 0." in refused(TINY["bert"](), flops=0.1) and "raise flops" in refused(TINY["bert"](), flops=0.1)
    model, _ = pruned("vit")
    assert "drops tokens already" in refused(model)
    with pytest.raises(LeanError, match=r"from 0\.05 to 1\.0"):
        get("zero-tprune").build({"flops": 0.0})
