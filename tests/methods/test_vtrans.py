"""The identities of the card vtrans."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from subjects import BOTH, decoder, encoder, outputs

import families
from families import ENCODER_DECODERS, TINY
from leanformers.anatomy import Anatomy, count_parameters
from leanformers.errors import LeanError
from leanformers.methods import Subject, get
from leanformers.methods.compress.vtrans import VTrans, harden, norms, stiff
from leanformers.surgery import ledger
from leanformers.surgery.units import UnitCosts
from leanformers.training.gating import Gates, certain, kept, soft

ONE_STACK = [name for name in TINY if name not in ENCODER_DECODERS]
CASES = [(name, head) for name in ONE_STACK for head in TINY[name].heads]
QUICK = {"batch_size": 16, "limit": 32, "rise": 0.5}


def gated(model, seed=0, *, share=0.7):
    """Gates on the model with random means and random units kept."""
    anatomy = Anatomy.of(model)
    hidden = stiff(anatomy, None) is None
    gates = Gates(anatomy, hidden=hidden, heads=not anatomy.family.shared_position_bias, seed=seed).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in gates.modules():
            if hasattr(gate, "mean"):
                gate.mean.copy_(0.7 + 0.6 * torch.rand(gate.size, generator=random))
                mask = torch.rand(gate.size, generator=random) < share
                mask[0] = True
                gate.settle(mask)
    return gates


def masked(model, gates, batch):
    anatomy = Anatomy.of(model)
    with gates.attached(anatomy, norms(anatomy) if gates.hidden is not None else ()):
        return families.outputs(model, batch)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_the_hardened_model_is_the_masked_model(name, head):
    model = TINY[name](head=head)
    gates, batch = gated(model), families.inputs(model, padded=True)
    expected = masked(model, gates, batch)
    subject = Subject(model=copy.deepcopy(model))
    harden(subject, gates)
    torch.testing.assert_close(families.outputs(subject.model, batch), expected, rtol=1e-4, atol=1e-4)
    anatomy = subject.anatomy
    costs = UnitCosts(Anatomy.of(model))
    held = sum(count_parameters(layer.module) for layer in anatomy.layers)
    assert float(costs(*gates.counted(kept))) == held
    assert gates.sizes()["hidden"] == anatomy.hidden_size
    assert gates.hidden is None or anatomy.hidden_size < Anatomy.of(model).hidden_size


@pytest.mark.parametrize("name", ONE_STACK)
def test_sure_gates_leave_the_dense_model(name):
    model = TINY[name]()
    batch = families.inputs(model, padded=True)
    before = families.outputs(model, batch)
    gates = Gates(Anatomy.of(model), hidden=stiff(Anatomy.of(model), None) is None, heads=True)
    with torch.no_grad():
        for gate in gates.modules():
            if hasattr(gate, "mean"):
                gate.mean.fill_(1)
                gate.log_variance.fill_(-100)
    for mode in (True, False):
        torch.testing.assert_close(masked(model, gates.train(mode), batch), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(families.outputs(model, batch), before)  # nothing is left attached
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_saturated_soft_counts_are_the_hard_ones_and_the_tensors():
    model = TINY["llama"]()
    gates = gated(model)
    with torch.no_grad():
        for gate in gates.modules():
            if hasattr(gate, "mean"):
                gate.log_variance.copy_(torch.where(gate.keep, -9.0, 9.0))
    costs = UnitCosts(Anatomy.of(model))
    with torch.no_grad():
        one, two, three = (float(costs(*gates.counted(of))) for of in (soft, certain, kept))
    subject = Subject(model=model)
    harden(subject, gates)
    held = sum(count_parameters(layer.module) for layer in subject.anatomy.layers)
    assert one == pytest.approx(held, rel=1e-6) and two == three == held


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_masked_evaluation_is_deterministic_and_heeds_padding(make):
    subject = make()
    gates, anatomy = gated(subject.model), subject.anatomy
    row = subject.task.features(subject.tokenizer, "test")[0]
    long = {"input_ids": [*row["input_ids"], 0, 0, 0], "attention_mask": [*row["attention_mask"], 0, 0, 0]}
    with gates.attached(anatomy, norms(anatomy)):
        first, again = outputs(subject), outputs(subject)
        plain, padded = (
            subject.model(**{k: torch.tensor([one[k]]) for k in ("input_ids", "attention_mask")}).logits
            for one in (row, long)
        )
    assert torch.equal(first, again)
    length = plain.shape[1]
    torch.testing.assert_close(padded[:, :length] if padded.ndim == 3 else padded, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_nothing_to_remove_changes_nothing(make):
    subject = make()
    get("vtrans").build({"target": 0.0, "beta": 0.0})(subject)
    assert torch.equal(outputs(subject), outputs(make())) and not ledger(subject.model)


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("variant", ["vtrans", "faster"])
def test_the_model_meets_the_target_and_the_seed_decides(make, variant, tmp_path):
    subject, again = make(hidden_size=96), make(hidden_size=96)
    costs = UnitCosts(subject.anatomy)
    for one in (subject, again):
        get("vtrans").build({"target": 0.4, "variant": variant, **QUICK})(one)
    held = sum(count_parameters(layer.module) for layer in subject.anatomy.layers)
    told = subject.notes["vtrans"]
    assert 0.58 < held / costs.whole <= 0.6 and told["sparsity"] == pytest.approx(1 - held / costs.whole)
    assert told["hidden"] == subject.anatomy.hidden_size and {"soft", "certain", "heads", "neurons"} <= set(told)
    assert torch.equal(outputs(subject), outputs(again))
    subject.model.save_pretrained(tmp_path)
    loaded = type(subject.model).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(Subject(model=loaded, tokenizer=subject.tokenizer, task=subject.task)), outputs(subject))


@pytest.mark.parametrize("embeddings", [False, True])
def test_the_estimate_counts_what_the_target_counts(embeddings):
    subject = decoder(hidden_size=96)
    whole, inside = subject.anatomy.parameters(), sum(count_parameters(one.module) for one in subject.anatomy.layers)
    method = VTrans(target=0.4, variant="faster", embeddings=embeddings, hidden=None if embeddings else False, **QUICK)
    estimate = method.estimate(subject.anatomy).parameters
    assert estimate == pytest.approx(-0.4 * (whole if embeddings else inside), rel=0.01)
    method(subject)
    assert subject.anatomy.parameters() - whole == pytest.approx(estimate, rel=0.03)


def test_faster_trains_the_gates_alone(monkeypatch):
    subject = decoder(hidden_size=96)
    before = copy.deepcopy(subject.model.state_dict())
    monkeypatch.setattr("leanformers.methods.compress.vtrans.harden", lambda subject, gates: None)
    get("vtrans").build({"variant": "faster", **QUICK})(subject)
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in subject.model.parameters())
    get("vtrans").build({"variant": "vtrans", **QUICK})(subject)
    assert not torch.equal(subject.model.lm_head.weight, before["lm_head.weight"])


def test_half_precision_stays():
    subject = decoder(hidden_size=96)
    subject.model.to(torch.bfloat16)
    get("vtrans").build({"variant": "faster", **QUICK})(subject)
    assert {parameter.dtype for parameter in subject.model.parameters()} == {torch.bfloat16}
    assert outputs(subject).isfinite().all()


def test_fast_takes_three_percent_of_the_data():
    seen = []

    class Counting(Subject):
        def train(self, *args, **options):
            seen.append(options["limit"])

    made = encoder()
    for variant, limit, expected in (("fast", None, 3), ("fast", 2, 2), ("vtrans", None, None), ("faster", 9, 9)):
        subject = Counting(model=copy.deepcopy(made.model), tokenizer=made.tokenizer, task=made.task)
        get("vtrans").build({"variant": variant, "limit": limit})(subject)
        rows = len(made.task.splits["train"])
        assert seen.pop() == (max(1, round(0.03 * rows)) if expected == 3 else expected)


def test_the_penalty_starts_at_one_nat_and_pulls_to_the_target():
    subject = decoder()
    penalty = VTrans(target=0.5).penalty(subject.anatomy, subject.task)
    with torch.no_grad():
        _starts_and_rises(penalty)
    penalty().backward()
    assert float(penalty.budget.linear.grad) == pytest.approx(-0.5, abs=1e-6)  # ascended: it becomes negative
    assert float(penalty.budget.square.grad) == pytest.approx(0.25, abs=1e-6)
    with torch.no_grad():
        penalty.budget.linear.fill_(-1)
        assert float(penalty()) == pytest.approx(1.5, rel=1e-5)


def _starts_and_rises(penalty):
    assert penalty.beta * float(penalty.divergence()) == pytest.approx(1, rel=1e-5)
    assert float(penalty.sparsity()) == pytest.approx(0, abs=1e-6)
    assert float(penalty()) == pytest.approx(1, rel=1e-5)  # no multipliers yet
    for step, aim in ((0, 0.0), (5, 0.25), (10, 0.5), (100, 0.5)):
        penalty.after_step(None, step, 100)
        assert float(penalty.aim) == pytest.approx(aim)


def test_multipliers_grow_until_the_soft_count_nears_the_target():
    subject = decoder(hidden_size=96)
    method = VTrans(target=0.3, variant="faster", epochs=10.0, batch_size=8, limit=32, rise=0.2, gate_rate=0.2)
    method(subject)
    told = subject.notes["vtrans"]
    assert 0.15 < told["soft"] < 0.6 and told["sparsity"] == pytest.approx(0.3, abs=0.01)


def test_an_embedder_keeps_the_width_of_its_vectors():
    subject = encoder(hidden_size=96)
    task = SimpleNamespace(kind="embedding")
    assert VTrans().penalty(subject.anatomy, task).gates.hidden is None
    assert "vectors" in get("vtrans").unsuitable(subject.anatomy, task, {"hidden": True})
    assert get("vtrans").unsuitable(subject.anatomy, task) is None


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("bart", {}, "one stack"),
        ("llama", {"target": 0.99, "hidden": False}, "out of reach"),
        ("llama", {"target": 0.9, "multiple": 64}, "out of reach"),
        ("wav2vec2", {"hidden": True}, "residual width cannot be cut"),
    ],
)
def test_what_cannot_work_is_refused(name, settings, words):
    assert words in get("vtrans").unsuitable(Anatomy.of(TINY[name]()), None, settings)


def test_linears_that_cannot_be_cut_are_refused():
    pytest.importorskip("torchao")
    subject = decoder()
    get("quantization").build({})(subject)
    assert "QuantisedLinear, out of which" in get("vtrans").unsuitable(subject.anatomy, subject.task)
    subject = decoder()
    get("essential-sparsity").build({"pattern": "2:4"})(subject)
    assert "2:4 mask" in get("vtrans").unsuitable(subject.anatomy, subject.task)
    with pytest.raises(LeanError, match="'target'"):
        get("vtrans").build({"target": 1.0})


def test_a_rotated_stream_keeps_its_width():
    subject = decoder()
    get("slicegpt").build({"slice": 0.25, "samples": 8, "multiple": 1})(subject)
    method = VTrans(target=0.2, variant="faster", limit=8)
    assert "rotated" in stiff(subject.anatomy, subject.task)
    before = sum(count_parameters(layer.module) for layer in subject.anatomy.layers)
    method(subject)
    held = sum(count_parameters(layer.module) for layer in subject.anatomy.layers)
    assert held / before == pytest.approx(0.8, abs=0.01) and held / before <= 0.8
    assert subject.notes["vtrans"]["hidden"] == subject.anatomy.hidden_size == 24
