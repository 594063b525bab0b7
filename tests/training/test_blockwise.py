"""Blocks outside their model's loop, and their local training."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from families import ENCODER_DECODERS, TINY, inputs
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.training import TrainingDiverged
from leanformers.training.blockwise import LOSSES, Blocks, reconstruct

ONE_STACK = [name for name in TINY if name not in ENCODER_DECODERS]


@pytest.mark.parametrize("family", ONE_STACK)
def test_blocks_run_one_by_one_are_the_model(family):
    model = TINY[family]()
    anatomy = Anatomy.of(model)
    batch = inputs(model, padded=True)
    expected = []
    for layer in anatomy.layers:
        layer.module.register_forward_hook(
            lambda _, __, out: expected.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        model(**batch)
        reference = list(expected)
        blocks = Blocks(anatomy, lambda batch: model(**batch))
        for _ in range(2):
            start = blocks.start(batch)
            hidden_states = start.hidden_states
            for index, output in enumerate(reference):
                hidden_states = start.run(index, hidden_states)
                assert torch.equal(hidden_states, output)
    assert not any("forward" in vars(layer.module) for layer in anatomy.layers)


def test_other_tensors_take_the_place_of_a_blocks_own():
    model, other = TINY["llama"](), TINY["llama"](seed=1)
    batch = inputs(model)
    start = Blocks(Anatomy.of(model), lambda batch: model(**batch)).start(batch)
    theirs = dict(Anatomy.of(other).layers[1].module.named_parameters())
    theirs.update(Anatomy.of(other).layers[1].module.named_buffers())
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = start.run(1, start.hidden_states, theirs)
    Anatomy.of(model).layers[1].module.load_state_dict(theirs, strict=True)
    assert torch.equal(start.run(1, start.hidden_states), found)
    model.load_state_dict(own)
    assert not torch.equal(start.run(1, start.hidden_states), found)


def test_padding_is_told_apart():
    model = TINY["bert"]()
    blocks = Blocks(Anatomy.of(model), lambda batch: model(**batch))
    padded, full = inputs(model, padded=True), inputs(model)
    assert torch.equal(blocks.real(padded, torch.zeros(2, 7, 32)), padded["attention_mask"].bool())
    assert blocks.real(full, torch.zeros(2, 7, 32)) is None
    with pytest.raises(LeanError, match=r"attention mask has the shape \[2, 7\]"):
        blocks.real(padded, torch.zeros(2, 5, 32))


def test_models_that_cannot_be_taken_apart_are_refused():
    with pytest.raises(LeanError, match="an encoder and a decoder"):
        Blocks(Anatomy.of(TINY["bart"]()), print)
    model = TINY["deberta-v2"](conv_kernel_size=3, conv_act="gelu")  # a convolution after the first layer
    blocks = Blocks(Anatomy.of(model), lambda batch: model(**batch))
    with pytest.raises(LeanError, match="more between its blocks"):
        blocks.start(inputs(model))
    assert not any("forward" in vars(module) for module in blocks.modules)
    with pytest.raises(LeanError, match="ran 0 of its 3 blocks"):
        Blocks(Anatomy.of(TINY["bert"]()), lambda batch: None).start({})


def test_losses():
    torch.manual_seed(0)
    student, target = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    mask = torch.ones(3, 5).bool()
    mask[1, 2:] = False

    def kl(dim):
        return functional.kl_div(student.log_softmax(dim), target.softmax(dim), reduction="none")

    torch.testing.assert_close(LOSSES["kl"](student, target, mask), kl(-1).sum(-1)[mask].mean())
    torch.testing.assert_close(LOSSES["kl"](student, target, None), kl(-1).sum(-1).mean())
    expected = functional.kl_div(student.log_softmax(0), target.softmax(0), reduction="batchmean")
    torch.testing.assert_close(LOSSES["kl_dim0"](student, target, None), expected)
    torch.testing.assert_close(LOSSES["mse"](student, target, mask), (student - target)[mask].square().mean())
    elsewhere = torch.where(mask[..., None], 0.0, 10 * torch.randn(3, 5, 4))  # what padding holds counts nowhere
    for loss in LOSSES.values():
        assert loss(target, target, mask).abs() < 1e-6
        torch.testing.assert_close(loss(student + elsewhere, target - elsewhere, mask), loss(student, target, mask))


def _linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, 4)


def test_a_linear_learns_what_another_gave_and_the_seed_decides():
    inputs_ = [torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    teacher, found = _linear(1), []
    targets = [teacher(x).detach() for x in inputs_]
    for seed in (0, 0, 1):
        student = _linear()
        groups = [{"params": student.parameters(), "lr": 0.05}, {"params": [], "lr": 1.0}]
        history = reconstruct(lambda _, x, s=student: s(x), inputs_, targets, groups, epochs=60, loss="mse", seed=seed)
        assert len(history) == 60 and history[-1] < 1e-3 * history[0]
        found.append(student.weight.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], teacher.weight.detach(), atol=0.05, rtol=0)


def test_the_learning_rate_falls_to_zero_along_a_cosine():
    """Adam's steps for a constant gradient are the learning rates."""
    weight = nn.Parameter(torch.zeros(1))
    seen = []

    def forward(index, x):
        seen.append(weight.item())
        return x + 1000 * weight

    reconstruct(forward, [torch.zeros(1, 1, 1)], [torch.full((1, 1, 1), 1e6)], [{"params": [weight], "lr": 1.0}],
                epochs=8, loss="mse")  # fmt: skip
    steps = torch.tensor([*seen, weight.item()]).diff()
    expected = 0.5 * (1 + torch.cos(torch.pi * torch.arange(8) / 8))
    torch.testing.assert_close(steps, expected, rtol=1e-2, atol=1e-3)


def test_what_cannot_be_trained_is_said():
    x = [torch.zeros(1, 2, 4)]
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}]
    with pytest.raises(LeanError, match="Unknown loss 'l1'"):
        reconstruct(lambda _, x: x, x, x, groups, epochs=1, loss="l1")
    with pytest.raises(LeanError, match="1 batches of inputs and 0 of outputs"):
        reconstruct(lambda _, x: x, x, [], groups, epochs=1)
    assert reconstruct(lambda _, x: x, x, x, [], epochs=1) == []
    with pytest.raises(TrainingDiverged, match="diverged in epoch 1"):
        reconstruct(lambda _, x: x * groups[0]["params"][0] / 0, x, x, groups, epochs=1, loss="mse", label="l")
