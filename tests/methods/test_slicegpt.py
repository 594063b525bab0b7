"""The identities of the card slicegpt, and what it holds at a time."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from subjects import decoder, encoder
from torch.profiler import ProfilerActivity, profile

from families import TINY, inputs, outputs
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.methods import Subject, get
from leanformers.methods.compress import slicegpt
from leanformers.methods.compress.slicegpt import principal, slice_along, turned

hold = slicegpt.hold
DECODERS = ("gpt2", "gpt-neox", "gpt-neox-sequential", "opt", "llama", "llama-ungrouped", "mistral", "qwen3", "phi3")


class Inputs:
    """Calibration batches for a tiny model of any kind; texts are padded."""

    kind = "causal-lm"
    splits: dict[str, list[Any]] = {"train": []}

    def __init__(self, batches: int = 3, length: int = 9) -> None:
        self.seeds, self.length = range(batches), length

    def calibration(self, tokenizer: Any, samples: int, batch_size: int = 8) -> Any:
        yield from (inputs(self.model, 4, self.length, seed, padded=True) for seed in self.seeds)

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return outputs(model, batch)


def subject(model: Any, **options: Any) -> Subject:
    task = Inputs(**options)
    task.model = model
    return Subject(model=model, task=task)


def run(one: Subject, **settings: Any) -> Subject:
    get("slicegpt").build(settings)(one)
    return one


@pytest.mark.parametrize("name", (*DECODERS, "vit", "deit"))
@pytest.mark.parametrize("orientation", ["pca", "random"])
def test_nothing_sliced_changes_nothing(name, orientation):
    model = TINY[name]()
    batch = inputs(model, padded=True)
    expected = outputs(model, batch)
    found = outputs(run(subject(model), slice=0.0, orientation=orientation).model, batch)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", (*DECODERS, "vit"))
def test_orientations_agree(name):
    batch = inputs(TINY[name](), padded=True)
    pca, random = (
        outputs(run(subject(TINY[name]()), slice=0.25, orientation=orientation).model, batch)
        for orientation in ("pca", "random")
    )
    torch.testing.assert_close(pca, random, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", (*DECODERS, "vit"))
def test_the_signal_that_is_looked_at_is_the_sliced_model_s(name, monkeypatch):
    """What waits behind the last block is, in its basis, what the finished model hands to its last norm."""
    one, kept, bases = subject(TINY[name]()), [], []
    monkeypatch.setattr(slicegpt, "hold", lambda *args: kept.append(hold(*args)) or kept[0])
    batches = list(one.calibration(4))
    slice_along(one, 24, lambda moment: bases.append(principal(moment)) or bases[-1], batches)
    for waiting, batch in zip(kept[0], batches, strict=True):
        norm, seen = one.anatomy.final_norms[0].module, []
        handle = norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        outputs(one.model, batch)
        handle.remove()
        expected = waiting.tokens(waiting.states) @ bases[-1][:, :24].float()
        torch.testing.assert_close(waiting.tokens(seen[0]), expected, rtol=1e-3, atol=1e-3)


def test_each_position_is_looked_at_once_without_its_padding_and_uncentred():
    seen: list[torch.Tensor] = []

    def axes(moment: torch.Tensor) -> torch.Tensor:
        seen.append(moment.clone())
        return principal(moment)

    one = subject(TINY["llama"](), batches=1)
    batch = next(one.calibration(4))
    real = batch["attention_mask"].bool()
    start = one.model.model.embed_tokens(batch["input_ids"])[real].double()
    slice_along(one, 24, axes, [batch])
    assert len(seen) == 7 and all(moment.dtype == torch.float64 for moment in seen)
    torch.testing.assert_close(seen[0], start.t() @ start)


def test_axes_are_principal_and_turning_keeps_their_span():
    rows = torch.randn(50, 16, dtype=torch.float64) * torch.linspace(3, 0.1, 16)
    axes = principal(rows.t() @ rows)
    energy = (rows @ axes).square().sum(0)
    assert (energy.diff() <= 1e-9).all()
    torch.testing.assert_close(axes.t() @ axes, torch.eye(16, dtype=torch.float64))
    other = turned(axes, 8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(other @ other.t(), axes[:, :8] @ axes[:, :8].t())
    assert not torch.allclose(other, axes[:, :8])


def test_the_principal_axes_lose_less_than_others_do():
    """On the stream of random tokens: the error behind the last block, against random axes at the same size."""
    model = TINY["llama"]()
    batch = inputs(model, padded=True)
    expected = outputs(model, batch)

    def random(moment: torch.Tensor) -> torch.Tensor:
        return turned(torch.eye(32, dtype=torch.float64), 32, generator)

    generator = torch.Generator().manual_seed(0)
    errors = {}
    for name, axes in {"principal": principal, "random": random}.items():
        one = subject(TINY["llama"](), batches=20)
        slice_along(one, 24, axes, list(one.calibration(4)))
        errors[name] = float((outputs(one.model, batch) - expected).square().mean())
    assert errors["principal"] < errors["random"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_folded_in_double(dtype):
    half = TINY["llama"]().to(dtype)
    batch = inputs(half)
    expected = outputs(half, batch).float()
    found = outputs(run(subject(half), slice=0.0).model, batch).float()
    assert half.model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert (found - expected).norm() <= (0.1 if dtype == torch.bfloat16 else 0.02) * expected.norm()


def test_settings_text_and_the_same_seed():
    before = decoder().anatomy
    one, again = (run(decoder(), slice=0.3, samples=16) for _ in range(2))
    assert one.anatomy.hidden_size == 16  # 22 rounded down to a multiple of 8
    batch = next(one.calibration(4))
    assert torch.equal(one.task.forward(one.model, batch), again.task.forward(again.model, batch))
    saving = get("slicegpt").build({"slice": 0.3}).estimate(before, 16)
    assert one.anatomy.parameters() - before.parameters() == saving.parameters
    assert one.anatomy.flops(16) - before.flops(16) == saving.flops
    assert one.notes["slicegpt"]["parameters, share of the model as given"] < 1


def test_the_card_s_count_of_parameters():
    """P(d') of the card, but for the head and the last position, which are sliced too; the head is tied before."""
    model = TINY["llama"](tie_word_embeddings=True)
    model.tie_weights()
    v, d, layers, heads, groups, dh, f = 96, 24, 3, 4, 2, 8, 64
    run(subject(model), slice=0.25)
    expected = 2 * v * d + layers * (d * (heads + 2 * groups) * dh + heads * dh * d + 3 * f * d + 2 * d * d)
    assert Anatomy.of(model).parameters() == expected


def test_lora_recovers_on_top():
    pytest.importorskip("peft")
    one = run(decoder(initializer_range=0.2), slice=0.25, samples=16)
    before = one.evaluate("train")["loss"]
    roles = ("query", "value", "output", "up", "down")
    get("lora").build({"epochs": 1.0, "learning_rate": 1e-2, "batch_size": 8, "roles": roles})(one)
    assert one.evaluate("train")["loss"] < before
    assert all(hasattr(layer.module.mlp.down_proj, "shortcut") for layer in one.anatomy.layers)


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (encoder, {}, "only pre-norm models"),
        (decoder, {"slice": 0.8}, "fewer than 8 of its 32"),
        (lambda: subject(TINY["gemma3"]()), {}, "rescales single dimensions"),
        (lambda: subject(TINY["llama"](head="base")), {}, "load it with one"),
    ],
)
def test_what_it_refuses(make, settings, words):
    one = make()
    assert words in (get("slicegpt").unsuitable(one.anatomy, one.task, settings) or "")


def test_too_little_text_is_refused_before_work():
    one = decoder()
    one.task.max_length = 500
    with pytest.raises(LeanError, match="fewer than one sequence of 500: raise samples"):
        run(one, samples=1)
    assert not hasattr(one.model.config, "quantization_config")


def rise(layers: int) -> int:
    """Largest number of allocated bytes while slicing, beyond the weights as they were."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        model = TINY["llama"](num_hidden_layers=layers, hidden_size=64, vocab_size=128)
        one = subject(model, batches=8, length=64)
        weights = 4 * one.anatomy.parameters()
        slice_along(one, 24, principal, list(one.calibration(4)))
    changes = [event for event in events.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))) - weights


def test_memory_beyond_the_weights_does_not_grow_with_the_model():
    small, large = rise(3), rise(6)
    assert large < 1.1 * small, (small, large)
