"""drop-layers, distillation, lora and quantization on tiny models."""

from __future__ import annotations

import copy

import pytest
import torch
from subjects import BOTH, decoder, encoder, outputs

from families import TINY
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.methods import get
from leanformers.methods.tune.distillation import kept_layers
from leanformers.surgery import DropLayers, apply, ledger, tier
from leanformers.tasks.embedding import Embedding


@pytest.mark.parametrize(("keep", "layers"), [(0.34, (0,)), (0.67, (0, 2)), (1.0, (0, 1, 2))])
def test_spaced_layers_keep_first_and_last(keep, layers):
    subject = encoder()
    get("drop-layers").build({"keep": keep})(subject)
    assert ledger(subject.model)[0].keep == layers
    assert tier(subject.model) == "stock"


def test_six_layers_halved_are_0_2_5():
    subject = encoder(num_hidden_layers=6)
    get("drop-layers").build({"keep": 0.5})(subject)
    assert ledger(subject.model)[0].keep == (0, 2, 5)
    get("drop-layers").build({"layers": [0, 2]})(subject)
    assert kept_layers(subject) == (0, 5)


def test_a_t5_keeps_no_fewer_encoder_than_decoder_layers_since_it_could_not_generate():
    info = get("drop-layers")
    fewer = {"layers": [0], "stack": "encoder"}
    model = TINY["t5"](head="lm")
    assert "drop decoder layers first" in info.unsuitable(Anatomy.of(model), None, fewer)
    assert info.unsuitable(Anatomy.of(model), None, {"layers": [0, 2], "stack": "encoder"}) is None
    assert info.unsuitable(Anatomy.of(TINY["bart"](head="lm")), None, fewer) is None
    for stack in ("decoder", "encoder"):
        assert info.unsuitable(Anatomy.of(model), None, {**fewer, "stack": stack}) is None
        apply(model, DropLayers(keep=(0,), stack=stack))
    written = model.eval().generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4)
    assert written.shape == (1, 5)


def test_layers_that_the_teacher_lacks_as_well_are_not_counted():
    from leanformers.training import Teacher

    subject = encoder(num_hidden_layers=6)
    get("drop-layers").build({"layers": [0, 2, 4, 5]})(subject)
    subject.teacher = Teacher(copy.deepcopy(subject.model), subject.task, subject.tokenizer)
    assert kept_layers(subject) is None
    get("drop-layers").build({"layers": [0, 3]})(subject)
    assert kept_layers(subject) == (0, 3)
    get("distillation").build({"epochs": 1, "hidden": 1.0})(subject)


def test_distillation_brings_the_student_nearer_to_its_teacher():
    from leanformers.training import Teacher

    subject = encoder()
    with torch.no_grad():  # a teacher with something to say
        subject.model.classifier.weight.normal_()
    subject.teacher = Teacher(copy.deepcopy(subject.model), subject.task, subject.tokenizer)
    target = outputs(subject, 20)
    get("drop-layers").build({"keep": 0.67})(subject)
    with torch.no_grad():
        subject.model.classifier.weight.zero_()
    before = (outputs(subject, 20) - target).norm()
    get("distillation").build({"epochs": 2, "learning_rate": 2e-3, "alpha": 1.0})(subject)
    assert (outputs(subject, 20) - target).norm() < 0.5 * before


def test_distillation_refuses_a_task_that_learns_from_its_pairs():
    rows = [{"query": f"question {i}", "body": f"answer {i}"} for i in range(4)]
    splits = {"train": rows, "validation": rows, "test": rows}
    info, anatomy = get("distillation"), Anatomy.of(encoder().model)
    assert info.unsuitable(anatomy, Embedding("pairs", splits)) is None
    assert "objective 'teacher'" in info.unsuitable(anatomy, Embedding("pairs", splits, objective="pairs"))


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_lora_trains_few_weights_and_leaves_a_stock_model(make, tmp_path):
    subject = make()
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    get("lora").build({"rank": 2, "epochs": 0.3, "learning_rate": 1e-2})(subject)
    after = subject.model.state_dict()
    assert set(after) == set(before) and tier(subject.model) == "stock"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    heads = {name for name in before if name.startswith("classifier")}
    assert changed - heads and all(
        "query" in n or "value" in n or "q_proj" in n or "v_proj" in n for n in changed - heads
    )
    assert subject.notes["trainable"] < 0.2 * subject.anatomy.parameters()
    assert all(parameter.requires_grad for parameter in subject.model.parameters())
    subject.model.save_pretrained(tmp_path)
    assert torch.equal(
        outputs(subject),
        outputs(
            type(subject)(
                model=type(subject.model).from_pretrained(tmp_path),
                tokenizer=subject.tokenizer,
                task=subject.task,
            )
        ),
    )


def test_lora_after_masking_and_factorising():
    subject = encoder()
    get("greenformers").build({"rank": 0.5, "roles": ["query"]})(subject)
    get("lora").build({"rank": 2, "epochs": 0.2})(subject)
    assert tier(subject.model) == "lean"


def test_lora_with_no_such_role_is_refused():
    with pytest.raises(LeanError, match="check roles"):
        get("lora").build({"roles": ["nothing"]})(encoder())


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("scheme", ["int8_weight_only", "int8_dynamic"])
@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_quantising_stays_near_and_counts_its_bytes(make, scheme, embeddings):
    pytest.importorskip("torchao")
    from leanformers.measure.cost import bytes_of_state

    subject, plain = make(), make()
    method = get("quantization").build({"scheme": scheme, "embeddings": embeddings})
    saving, before = method.estimate(subject.anatomy), bytes_of_state(subject.model)
    method(subject)
    assert subject.anatomy.parameters() == plain.anatomy.parameters()
    assert bytes_of_state(subject.model) - before == saving.bytes
    error = (outputs(subject) - outputs(plain)).norm() / outputs(plain).norm()
    assert 0 < error < 0.05


def test_pruned_and_factorised_then_quantised_is_one_ledger(tmp_path):
    pytest.importorskip("torchao")
    subject = decoder()
    for step in (
        {"method": "drop-layers", "keep": 0.67},
        {"method": "greenformers", "rank": 0.5},
        {"method": "quantization"},
    ):
        settings = {key: value for key, value in step.items() if key != "method"}
        get(step["method"]).build(settings)(subject)
    subject.model.save_pretrained(tmp_path)
    again = type(subject.model).from_pretrained(tmp_path)
    expected = outputs(subject)
    subject.model = again
    assert torch.equal(outputs(subject), expected)


def test_skip_leaves_roles_in_float():
    pytest.importorskip("torchao")
    subject = encoder()
    get("quantization").build({"skip": ["down"]})(subject)
    layer = subject.anatomy.layers[0]
    assert isinstance(layer.feed_forward.down.module, torch.nn.Linear)
    assert not isinstance(layer.feed_forward.up.module, torch.nn.Linear)


@pytest.mark.parametrize("name", ["fine-tune", "lora", "distillation"])
@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_a_model_in_half_precision_stays_so_and_its_frozen_weights_are_never_more(name, make, tmp_path, monkeypatch):
    from leanformers.training import Teacher
    from leanformers.training.trainer import LeanTrainer

    subject = make()
    subject.model.bfloat16()
    subject.teacher = Teacher(copy.deepcopy(subject.model), subject.task, subject.tokenizer)
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in subject.model.named_parameters()}
    seen, train = [], LeanTrainer.train

    def look(trainer, **options):
        seen.extend((p.requires_grad, p.dtype) for p in trainer.objective.model.parameters())
        return train(trainer, **options)

    monkeypatch.setattr(LeanTrainer, "train", look)
    get(name).build({"epochs": 1, "learning_rate": 1e-2})(subject)
    assert {dtype for trained, dtype in seen if trained} == {torch.float32}
    assert {dtype for trained, dtype in seen if not trained} <= {torch.bfloat16}
    after = dict(subject.model.named_parameters())
    assert after.keys() == before.keys() and {p.dtype for p in after.values()} == {torch.bfloat16}
    moved = {n for n, p in after.items() if not torch.equal(p, before[n][1])}
    assert moved
    if name == "lora":
        assert all("query" in n or "value" in n or "q_proj" in n or "v_proj" in n or "classifier" in n for n in moved)
        assert all(after[n].data_ptr() == before[n][0] for n in after if "classifier" not in n)
    subject.model.save_pretrained(tmp_path)
    assert type(subject.model).from_pretrained(tmp_path).dtype == torch.bfloat16
