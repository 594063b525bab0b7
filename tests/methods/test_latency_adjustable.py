"""ACC elimination: the gathered form against a masked dense reference, the arithmetic, the knob, refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as T
from subjects import decoder, encoder
from torch import Tensor

from families import TINY, inputs, outputs
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.measure.cost import count_flops
from leanformers.methods import Subject, get
from leanformers.methods.run.latency_adjustable import LatencyAdjustable, layer_costs, observe, set_speedup
from leanformers.parts.token_reducers import reduction
from leanformers.parts.token_schedule import decay, fractions, lengths, multiply_adds
from leanformers.surgery import ReduceTokens, apply, ledger
from leanformers.surgery.edits import reduce_tokens

QUICK = {"rate": 0.5, "dense_epochs": 0.0, "epochs": 0.0, "samples": 8}
LENGTH = 24


def bert(seed: int = 0, **fields: Any) -> Any:
    sizes = {"num_hidden_layers": 4, "max_position_embeddings": 64, **fields}
    return TINY["bert"](seed=seed, head="classification", **sizes)


def batch_of(*counts: int, seed: int = 0) -> dict[str, Tensor]:
    """Texts of so many tokens, padded on the right."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(counts))[None] < torch.tensor(counts)[:, None]
    ids = torch.randint(4, 96, mask.shape, generator=random) * mask
    return {"input_ids": ids, "attention_mask": mask.long()}


def eliminating(model: Any, speedup: float = 1.6, fall: float = 0.4, shift: int = 0) -> Any:
    """The model with the edit."""
    anatomy = Anatomy.of(model)
    layers = len(anatomy.layers)
    costs = [[cost.attention, cost.pairs, cost.feed_forward] for cost in layer_costs(anatomy)]
    settings = {"curve": list(decay(fall, layers, shift)), "costs": costs, "length": LENGTH, "speedup": speedup}
    edit = ReduceTokens(layers=tuple(range(layers)), where="before_feed_forward", rule="received", settings=settings)
    return apply(model, edit).eval()


@torch.no_grad()
def reference(model: Any, batch: dict[str, Tensor], keep: tuple[float, ...]) -> Tensor:
    """Logits of a stock BERT by additive masks: nothing is gathered; what was dropped is seen by no one any more."""
    bert, real = model.bert, batch["attention_mask"].bool()
    hidden = bert.embeddings(batch["input_ids"])
    total, alive = real.sum(1), real
    for layer, share in zip(bert.encoder.layer, keep, strict=True):
        part = layer.attention.self
        heads = [
            linear(hidden).unflatten(-1, (part.num_attention_heads, -1)).transpose(1, 2)
            for linear in (part.query, part.key, part.value)
        ]
        bias = torch.zeros(alive.shape, dtype=hidden.dtype).masked_fill(~alive, torch.finfo(hidden.dtype).min)
        probabilities = (heads[0] @ heads[1].mT * heads[0].shape[-1] ** -0.5 + bias[:, None, None]).softmax(-1)
        context = (probabilities @ heads[2]).transpose(1, 2).flatten(2)
        hidden = layer.attention.output(context, hidden)
        scores = (probabilities * alive[:, None, :, None]).sum((1, 2))
        alive = torch.stack(
            [survivors(*row, share) for row in zip(scores.tolist(), alive, total.tolist(), strict=True)]
        )
        hidden = layer.output(layer.intermediate(hidden), hidden)
    return model.classifier(bert.pooler(hidden))


def survivors(scores: list[float], alive: Tensor, total: int, share: float) -> Tensor:
    """The class token and those of the highest (score, -position)."""
    there = alive.nonzero().flatten().tolist()
    count = lengths([share], total)[1]
    best = sorted(there[1:], key=lambda place: (-scores[place], place))
    kept = torch.zeros_like(alive)
    kept[[0, *best[: count - 1]]] = True
    return kept & alive if count < len(there) else alive


def keep_of(model: Any) -> tuple[float, ...]:
    rule = reduction(model).rule
    return fractions(rule.curve, rule.gamma)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("speedup", [1.0, 1.3, 1.6, 2.0])
def test_gathered_is_masked(speedup, shift):
    model, stock = eliminating(bert().double(), speedup, shift=shift), bert().double()
    batch = batch_of(24, 17, 9, 1, 2)
    torch.testing.assert_close(outputs(model, batch), reference(stock, batch, keep_of(model)), rtol=1e-5, atol=1e-6)
    dense = outputs(stock, batch)
    assert torch.allclose(dense, outputs(model, batch), atol=1e-6) == (speedup == 1.0)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "vit", "deit", "dinov2"])
def test_a_speedup_of_one_is_the_stock_model_to_the_bit(family):
    model, stock = (TINY[family](head="classification") for _ in range(2))
    eliminating(model, 1.0)
    batch = inputs(stock, padded=True)
    stock.set_attn_implementation("sdpa")
    assert torch.equal(outputs(model, batch), outputs(stock, batch))
    assert set(model.state_dict()) == set(stock.state_dict())
    assert not torch.allclose(outputs(model, {**batch, "speedup": 1.3}), outputs(stock, batch), atol=1e-5)


def test_a_text_gives_the_same_alone_padded_and_in_a_mixed_batch():
    model = eliminating(bert())
    together = batch_of(24, 13, 5)
    mixed = outputs(model, together)
    for row, count in enumerate((24, 13, 5)):
        alone = {name: tensor[row : row + 1, :count] for name, tensor in together.items()}
        torch.testing.assert_close(outputs(model, alone)[0], mixed[row], rtol=1e-4, atol=1e-5)
        longer = {
            name: torch.nn.functional.pad(tensor[row : row + 1, :count], (0, 17)) for name, tensor in together.items()
        }
        torch.testing.assert_close(outputs(model, longer)[0], mixed[row], rtol=1e-4, atol=1e-5)


def test_counts_follow_the_schedule_and_the_class_token_stays_first():
    model = eliminating(bert(), 2.0)
    held = reduction(model)
    outputs(model, batch_of(24, 10, 3))
    expected = torch.tensor([lengths(keep_of(model), count)[2:] for count in (24, 10, 3)])  # the first layer is idle
    assert torch.equal(torch.stack(held.counts(), 1), expected)
    assert (expected.diff(dim=1) <= 0).all() and (expected >= 1).all()
    for kept in held.left.values():
        assert (kept.index[:, 0] == 0).all()
        inside = kept.index.masked_fill(~kept.real, 10_000)
        assert (inside.diff(dim=1) >= 0).all()  # in their order


def test_the_order_of_what_stays_does_not_matter(monkeypatch):
    model, batch = eliminating(bert()), batch_of(24)
    del batch["attention_mask"]
    before = outputs(model, batch)
    held, choose = reduction(model), type(reduction(model)).choose

    def shuffled(self, place, *args):
        choose(self, place, *args)
        index = self.left[place].index
        order = torch.randperm(index.shape[1] - 1, generator=torch.Generator().manual_seed(place)) + 1
        self.left[place].index = torch.cat([index[:, :1], index[:, order]], 1)

    monkeypatch.setattr(type(held), "choose", shuffled)
    torch.testing.assert_close(outputs(model, batch), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("speedup", [1.0, 1.5, 2.0])
def test_counted_flops_are_the_formulas(speedup):
    model = eliminating(bert(), speedup)
    batch = {"input_ids": batch_of(LENGTH)["input_ids"]}
    counted = count_flops(lambda: model(**batch), model).total
    anatomy, stock = Anatomy.of(model), Anatomy.of(bert())
    formula = 2 * multiply_adds(layer_costs(stock), keep_of(model), LENGTH)
    outer = stock.flops(LENGTH) - stock.layer_flops(LENGTH)
    assert counted == formula + outer == anatomy.flops(LENGTH)
    assert stock.layer_flops(LENGTH) / formula >= speedup
    assert reduction(model).rule.expected(LENGTH) == stock.layer_flops(LENGTH) / formula


def test_the_knob_holds_for_one_call_or_for_good_and_touches_no_weight(tmp_path):
    model, batch = eliminating(bert(), 1.6), batch_of(24, 9)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    usual = outputs(model, batch)
    faster = outputs(model, {**batch, "speedup": 2.0})
    assert not torch.allclose(faster, usual, atol=1e-5)
    assert torch.equal(outputs(model, batch), usual)
    assert torch.equal(outputs(model, {**batch, "speedup": None}), usual)
    set_speedup(model, 2.0)
    assert torch.equal(outputs(model, batch), faster)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert [edit.settings["speedup"] for edit in ledger(model)] == [2.0]
    model.save_pretrained(tmp_path)
    again = T.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again, batch), faster)
    assert torch.equal(outputs(again, {**batch, "speedup": 1.6}), usual)
    rule, loaded = reduction(model).rule, reduction(again).rule
    assert (rule.curve, rule.gamma, rule.length) == (loaded.curve, loaded.gamma, loaded.length)
    reduction(again).rule.gamma = 0.0  # the plain attribute
    assert torch.equal(outputs(again, batch), outputs(again, {**batch, "speedup": 1.0}))


def test_what_the_curve_does_not_reach_is_refused_and_changes_nothing():
    model, batch = eliminating(bert(), 1.6), batch_of(9)
    usual = outputs(model, batch)
    for wanted, words in ((100.0, "out of reach"), (0.5, "give 1"), ("fast", "give a number"), (True, "give a number")):
        with pytest.raises(LeanError, match=words):
            model(**batch, speedup=wanted)
        with pytest.raises(LeanError, match=words):
            set_speedup(model, wanted)
    assert torch.equal(outputs(model, batch), usual)
    with pytest.raises(LeanError, match="apply latency-adjustable"):
        set_speedup(bert(), 2.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"curve": [1.0, 0.5, 0.6, 0.4]}, "fall or stay"),
        ({"curve": [1.0, 0.5]}, "curve has 2 values"),
        ({"curve": [1.0, 0.5, 0.2, 0.0]}, "layer 3 is 0.0"),
        ({"costs": [[1, 1]] * 4}, "three numbers"),
        ({"length": 0}, "length is 0"),
        ({"speedup": 50.0}, "out of reach"),
    ],
)
def test_bad_schedules_are_refused(change, words):
    settings = {"curve": [1.0, 0.8, 0.5, 0.2], "costs": [[9, 1, 9]] * 4, "length": 20, "speedup": 1.2, **change}
    edit = ReduceTokens(layers=(0, 1, 2, 3), where="before_feed_forward", rule="received", settings=settings)
    with pytest.raises(LeanError, match=words):
        apply(bert(), edit)


def test_training_moves_the_dense_weights_through_what_stays():
    model, batch = eliminating(bert(), 2.0), batch_of(24)
    for parameter in model.parameters():
        parameter.grad = None
    model(**batch).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.bert.encoder.parameters())
    table = model.bert.embeddings.position_embeddings.weight.grad[:24]
    assert (table != 0).any(1).all()  # dropped tokens were still attended to


def treated(seed: int = 0, **settings: Any) -> Subject:
    subject = encoder(seed, initializer_range=0.2)
    get("latency-adjustable").build({**QUICK, "speedup": 1.5, **settings})(subject)
    return subject


def test_the_method_serves_its_speedup_and_says_what_it_found():
    subject = treated(train_speedup=1.8, epochs=0.1)
    notes = subject.notes["latency-adjustable"]
    assert len(notes["contributions"]) == 3 and all(0 < value <= 1 for value in notes["contributions"])
    rule = reduction(subject.model).rule
    assert rule.gamma == notes["gamma"] and rule.expected(rule.length) >= 1.5
    assert ledger(subject.model)[0].settings["speedup"] == 1.5
    assert subject.trained_examples > 0
    again = treated(train_speedup=1.8, epochs=0.1)
    assert all(torch.equal(a, b) for a, b in zip(subject.model.parameters(), again.model.parameters(), strict=True))


def test_it_is_trained_with_all_tokens_first_and_then_at_the_training_speedup(monkeypatch):
    seen: list[Any] = []

    def train(self, epochs, learning_rate, **options):
        held = reduction(self.model)
        seen.append((epochs, None if held is None else ledger(self.model)[0].settings["speedup"]))

    monkeypatch.setattr(Subject, "train", train)
    treated(dense_epochs=3.0, epochs=1.0, train_speedup=1.8)
    assert seen == [(3.0, None), (1.0, 1.8)]


def test_contributions_are_means_over_texts_whatever_the_batches():
    subject = encoder(initializer_range=0.2)
    whole, length = observe(subject, 12)
    rows = [row for batch in subject.calibration(12, batch_size=12) for row in batch["attention_mask"].sum(1)]
    assert length == pytest.approx(float(torch.stack(rows).double().mean()))
    subject.calibration = lambda samples, batch_size: Subject.calibration(subject, samples, batch_size=1)  # type: ignore
    assert observe(subject, 12)[0] == pytest.approx(whole, rel=1e-4)


def test_attention_that_does_not_gather_is_said(monkeypatch):
    monkeypatch.setattr("leanformers.methods.run.latency_adjustable.observe", lambda *args: ([1.0, 1.0, 1.0], 20.0))
    with pytest.raises(LeanError, match="spread as evenly"):
        treated(rate=None)


def test_models_and_tasks_that_it_cannot_serve_are_refused_before_any_work():
    info = get("latency-adjustable")
    reasons = [info.unsuitable(decoder().anatomy, decoder().task)]
    for family, head in (("bert", "lm"), ("llama", "classification"), ("mpnet", "classification"), ("t5", "lm")):
        reasons.append(info.unsuitable(Anatomy.of(TINY[family](head=head)), None))
    subject = encoder()
    reasons.append(info.unsuitable(subject.anatomy, subject.task, {"speedup": 50.0}))
    subject.apply(ReduceTokens(**vars(ledger(treated().model)[0])))
    reasons.append(info.unsuitable(subject.anatomy, subject.task))
    assert all(reason and "\n" not in reason and len(reason) < 400 for reason in reasons), reasons


def test_a_speedup_that_no_curve_reaches_is_refused_before_the_tuning(monkeypatch):
    monkeypatch.setattr(Subject, "train", lambda *args, **options: pytest.fail("it was trained"))
    subject = encoder()
    for settings in ({"speedup": 1.75}, {"speedup": 1.2, "train_speedup": 1.75}):
        assert get("latency-adjustable").unsuitable(subject.anatomy, subject.task, {**settings, "length": 60}) is None
        with pytest.raises(LeanError, match="at most"):
            treated(dense_epochs=1.0, length=2, **settings)


def test_a_dropped_sublayer_is_refused():
    from leanformers.surgery import DropSublayers

    subject = encoder()
    subject.apply(DropSublayers(path="encoder.layer.1", sublayers=("attention",)))
    assert "has lost" in get("latency-adjustable").unsuitable(subject.anatomy, subject.task)


def test_the_default_can_be_set_by_the_edits_own_function():
    model = eliminating(bert(), 1.6)
    reduce_tokens.set_default(model, speedup=1.0)
    assert reduction(model).rule.gamma == 0.0


def test_the_estimate_is_the_speedups_share():
    anatomy = encoder().anatomy
    saving = LatencyAdjustable(speedup=2.0).estimate(anatomy, 64)
    assert saving.parameters == 0 and saving.flops == pytest.approx(-anatomy.layer_flops(64) / 2, rel=1e-6)


class Images(Subject):
    """Random images, and nothing to learn."""

    def calibration(self, samples, batch_size=8):
        for seed in range(-(-samples // batch_size)):
            yield inputs(self.model, batch=batch_size, seed=seed)

    def train(self, *args, **options):
        pass


@pytest.mark.parametrize("family", ["vit", "deit"])
def test_images_of_one_size_lose_patches_and_keep_their_summary_tokens(family):
    model = TINY[family](head="classification")
    task = SimpleNamespace(kind="image-classification", forward=lambda model, batch: model(**batch).logits)
    subject = Images(model=model, task=task)
    LatencyAdjustable(speedup=1.5, **QUICK)(subject)
    summary = {"vit": 1, "deit": 2}[family]
    assert subject.notes["latency-adjustable"]["length"] == 16 + summary
    together = outputs(model, inputs(model, batch=3))
    held = reduction(model)
    assert held.counts() and all(isinstance(count, int) for count in held.counts())
    for kept in held.left.values():
        assert (kept.index[:, :summary] == torch.arange(summary)).all()
    for row in range(3):
        alone = {name: tensor[row : row + 1] for name, tensor in inputs(model, batch=3).items()}
        torch.testing.assert_close(outputs(model, alone)[0], together[row], rtol=1e-4, atol=1e-5)
