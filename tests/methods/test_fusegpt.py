"""The identities of the card fusegpt, on every family whose blocks form one stack."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from subjects import BOTH, decoder, encoder, outputs
from torch import nn

import families
from families import ENCODER_DECODERS, TINY, inputs
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.methods import Subject, get
from leanformers.methods.compress.fusegpt import FuseGPT, Fusion, window
from leanformers.surgery import DropLayers, FactoriseLinear, KeepNeurons, MaskWeights, QuantiseLinear, apply, tier
from leanformers.training.injection import Injection

ONE_STACK = [name for name in TINY if name not in ENCODER_DECODERS]
CACHED = ("gpt2", "gpt-neox", "opt", "llama", "qwen3", "phi3")
SMALL = {"sparsity": 0.3, "group": 3, "rank": 4, "adapter_rank": 2, "samples": 4, "score_samples": 4, "batch_size": 2}


class Rows:
    """Two batches of random inputs, padded where the family can be; the outputs are the model's first."""

    kind = "rows"

    def calibration(self, tokenizer: Any, samples: int, batch_size: int) -> Iterator[dict[str, Any]]:
        padded = "wav2vec2" not in tokenizer.config.model_type
        for seed in range(samples // batch_size):
            yield inputs(tokenizer, batch_size, seed=seed, padded=padded)

    def forward(self, model: Any, batch: dict[str, Any]) -> Any:
        return model(**batch)[0]


def subject(family: str, seed: int = 0, **fields: Any) -> Subject:
    model = TINY[family](**fields)
    return Subject(model=model, tokenizer=model, task=Rows(), seed=seed)


def fusion(of: Subject, **settings: Any) -> Fusion:
    of.model.eval()
    return Fusion(of, FuseGPT(**{**SMALL, **settings}))


def fuse(of: Subject, **settings: Any) -> Subject:
    get("fusegpt").build({**SMALL, "epochs": 2, **settings})(of)
    return of


def said(of: Subject) -> torch.Tensor:
    return families.outputs(of.model, inputs(of.model))


def after(fused: Fusion, blocks: list[int], batch: int = 0) -> torch.Tensor:
    start = fused.blocks.start(fused.batches[batch])
    with torch.no_grad():
        return fused._through(blocks, start.hidden_states, start)


def stirred(fused: Fusion, seed: int = 0) -> None:
    """Coefficients as training would leave them: away from zero."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in fused.injected.values():
            for parameter in (*part.coefficients(), *part.adapters()):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_no_sparsity_is_the_dense_model(make):
    before = make()
    done = make()
    get("fusegpt").build({"sparsity": 0.0})(done)
    assert torch.equal(outputs(done), outputs(before)) and tier(done.model) == "stock"


@pytest.mark.parametrize("family", ONE_STACK)
def test_an_injection_changes_nothing_before_training(family):
    fused = fusion(subject(family))
    deleted = after(fused, [0, 2])
    fused._inject(1, [0, 2])
    assert fused.injected and torch.equal(after(fused, [0, 2]), deleted)


@pytest.mark.parametrize("family", ONE_STACK)
def test_folded_equals_unfolded(family):
    fused = fusion(subject(family))
    fused._inject(1, [0, 2])
    deleted = after(fused, [0, 2])
    stirred(fused)
    unfolded = after(fused, [0, 2])
    for part in fused.injected.values():
        part.fold()
    fused.injected.clear()  # the blocks' own modules answer
    torch.testing.assert_close(after(fused, [0, 2]), unfolded, rtol=1e-5, atol=1e-5)
    assert (unfolded - deleted).abs().max() > 1e-2


@pytest.mark.parametrize("family", ONE_STACK)
def test_parameters_drop_by_the_blocks_and_the_result_is_stock(family):
    of = subject(family)
    size = sum(parameter.numel() for parameter in of.anatomy.layers[1].module.parameters())
    estimate = get("fusegpt").build(SMALL).estimate(of.anatomy)
    before = of.anatomy.parameters()
    fuse(of)
    assert of.anatomy.parameters() - before == -size == estimate.parameters
    assert of.anatomy.num_hidden_layers == 2 and tier(of.model) == "stock"
    assert not any(parameter.grad is not None for parameter in of.model.parameters())


def test_plain_transformers_loads_it_in_a_process_without_leanformers(tmp_path, fresh):
    wanted = {}
    for family in ("llama", "qwen3", "gemma3", "gpt2", "opt", "phi3", "gpt-neox", "bert", "vit"):
        of = fuse(subject(family))
        of.model.save_pretrained(tmp_path / family)
        torch.save((inputs(of.model), said(of)), tmp_path / f"{family}.pt")
        wanted[family] = type(of.model).__name__
    code = """
import json, sys, torch, transformers
root, failed = sys.argv[1], {}
for family, name in json.loads(sys.argv[2]).items():
    model = getattr(transformers, name).from_pretrained(f"{root}/{family}").eval()
    batch, expected = torch.load(f"{root}/{family}.pt", weights_only=True)
    with torch.no_grad():
        same = torch.equal(model(**batch).logits, expected)
    if not same or model.config.num_hidden_layers != 2 or hasattr(model.config, "quantization_config"):
        failed[family] = str(model.config)
print(json.dumps([failed, "leanformers" in sys.modules]))
"""
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(wanted)]
    run = fresh.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == [{}, False]


@pytest.mark.parametrize("family", CACHED)
def test_cached_generation_equals_the_full_forward(family):
    model = fuse(subject(family)).model
    batch = inputs(model)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


def test_a_round_changes_the_group_alone():
    fused = fusion(subject("llama", num_hidden_layers=8), group=4, epochs=2)
    fused._inject(7, [6])
    stirred(fused)
    before = {name: tensor.clone() for name, tensor in fused.subject.model.state_dict().items()}
    outside = {name: tensor.clone() for name, tensor in fused.injected[6].effective().items()}
    fused.alive.remove(7)
    fused.influence = lambda: {block: float(block != 1) for block in fused.alive}
    done = fused.round()
    assert done.removed == 1 and done.group == [0, 1, 2, 3] and sorted(fused.injected) == [0, 2, 3, 6]
    # What was trained lies beside the model, whose own tensors wait for the fold.
    assert all(torch.equal(tensor, before[name]) for name, tensor in fused.subject.model.state_dict().items())
    assert all(torch.equal(tensor, outside[name]) for name, tensor in fused.injected[6].effective().items())
    for block in (0, 2, 3):
        own = dict(fused.anatomy.layers[block].module.named_parameters())
        changed = [name for name, tensor in fused.injected[block].effective().items() if not tensor.equal(own[name])]
        assert changed == list(own)  # linears and norms, all of them


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert", "deberta-v2"])
def test_macro_influence_is_what_the_model_without_the_block_says(family):
    of = subject(family)
    found = fusion(of).influence()
    for gone in range(3):
        states = {}
        for name in ("whole", "without"):
            model = TINY[family]()
            layers = Anatomy.of(model).layers
            states[name] = []
            layers[-1].module.register_forward_hook(
                lambda _, args, out, kept=states[name], skip=name == "without" and gone == 2: kept.append(
                    args[0] if skip else out[0] if isinstance(out, tuple) else out
                )
            )
            if name == "without" and gone < 2:
                layers[gone].module.forward = lambda hidden, *_, tuple_=family == "deberta-v2", **__: (
                    (hidden, None) if tuple_ else hidden
                )
            for batch in of.task.calibration(model, 4, batch_size=2):
                with torch.no_grad():
                    model(**batch)
                states[name][-1] = states[name][-1][batch["attention_mask"].bool()]
        cosine = torch.cosine_similarity(torch.cat(states["whole"]), torch.cat(states["without"]), dim=-1)
        assert found[gone] == pytest.approx(1 - cosine.mean().item(), abs=1e-5)


def test_influence_is_measured_on_the_fused_model():
    fused = fusion(subject("llama", num_hidden_layers=5), epochs=1)
    before = fused.influence()
    fused._inject(2, [1, 3])
    fused.alive.remove(2)
    deleted = fused.influence()
    stirred(fused)
    assert set(deleted) == {0, 1, 3, 4} and deleted != before and fused.influence() != deleted


def test_the_effective_weight_is_the_sum_of_the_card():
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    own, one, two = (nn.Linear(6, 4) for _ in range(3))
    part = Injection(own, 3, random)
    part.inject(one, 2)
    part.inject(two, 5)
    assert all(torch.equal(tensor, getattr(own, name)) for name, tensor in part.effective().items())
    with torch.no_grad():
        for parameter in (*part.adapters(), *part.coefficients()):
            parameter.copy_(torch.randn(parameter.shape))
    expected = (
        own.weight + part.b @ part.a + (part.c[0] @ part.d[0]) * one.weight + (part.c[1] @ part.d[1]) * two.weight
    )
    found = part.effective()
    torch.testing.assert_close(found["weight"], expected)
    torch.testing.assert_close(found["bias"], own.bias + part.bias[0] * one.bias + part.bias[1] * two.bias)
    (found["weight"].square().sum() + found["bias"].sum()).backward()
    assert all(parameter.grad is not None for parameter in (*part.adapters(), *part.coefficients()))
    assert all(linear.weight.grad is None and linear.bias.grad is None for linear in (own, one, two))


def test_coefficients_start_as_the_card_says():
    random = torch.Generator().manual_seed(0)
    part = Injection(nn.Linear(400, 300), 128, random)
    part.inject(nn.Linear(400, 300), 64)
    assert not part.b.any() and not part.c[0].any() and not part.bias[0].any()
    for drawn in (part.a, part.d[0]):  # Kaiming-uniform, a = sqrt 5: uniform within 1 / sqrt(in)
        assert drawn.abs().max() <= 0.05 and drawn.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.02)


def test_many_injections_of_one_linear_are_folded_early():
    random = torch.Generator().manual_seed(0)
    own, many = nn.Linear(6, 4), [nn.Linear(6, 4) for _ in range(5)]
    part = Injection(own, 2, random)
    for linear in many[:4]:
        part.inject(linear, 2)
    with torch.no_grad():
        for parameter in (*part.adapters(), *part.coefficients()):
            parameter.copy_(torch.randn(parameter.shape))
    before = part.effective()
    part.inject(many[4], 2)
    assert len(part.sources) == 1
    for name, tensor in part.effective().items():
        torch.testing.assert_close(tensor, before[name])


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("loss", ["kl", "kl_dim0", "mse"])
def test_training_brings_the_group_nearer_and_the_seed_decides(make, loss):
    settings = {**SMALL, "samples": 16, "batch_size": 8, "length": 24, "epochs": 4, "learning_rate": 0.02, "loss": loss}
    results = []
    for seed in (0, 0, 1):
        of = make(initializer_range=0.3)
        of.seed = seed
        get("fusegpt").build(settings)(of)
        (done,) = of.notes["fusegpt"]
        assert done["losses"][-1] < 0.95 * done["losses"][0]
        results.append(outputs(of))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_without_epochs_blocks_are_deleted_in_the_order_of_influence():
    of, plain = subject("llama", num_hidden_layers=6), subject("llama", num_hidden_layers=6)
    fuse(of, sparsity=0.5, epochs=0)
    removed = [entry["removed"] for entry in of.notes["fusegpt"]]
    apply(plain.model, DropLayers(keep=tuple(sorted(set(range(6)) - set(removed)))))
    assert len(removed) == 3 and torch.equal(said(of), said(plain))


def test_coefficients_train_in_float32_beside_a_bfloat16_model():
    of = subject("llama")
    of.model.bfloat16()
    fused = fusion(of, epochs=3, learning_rate=0.02)
    done = fused.round()
    parameters = [p for part in fused.injected.values() for p in (*part.coefficients(), *part.adapters())]
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    assert done.losses[-1] < done.losses[0]
    for part in fused.injected.values():
        assert all(tensor.dtype == torch.bfloat16 for tensor in part.effective().values())
        part.fold()
    assert of.model.dtype == torch.bfloat16


def test_a_factorised_model_fuses_in_its_factors():
    of = subject("llama")
    for path in Anatomy.of(of.model).roles:
        apply(of.model, FactoriseLinear(path=path, rank=8))
    assert get("fusegpt").unsuitable(of.anatomy, of.task, SMALL) is None
    before = said(of)
    fuse(of)
    assert said(of).shape == before.shape and of.anatomy.num_hidden_layers == 2 and tier(of.model) == "lean"


def test_windows_shift_where_the_model_ends():
    alive = list(range(12))
    assert window(alive, 6, 8) == [2, 3, 4, 5, 6, 7, 8, 9]  # t = p - 1, from t - 3 to p + 3
    assert window(alive, 0, 8) == window(alive, 3, 8) == list(range(8))
    assert window(alive, 11, 8) == list(range(4, 12))
    assert window([0, 2, 5, 7, 9], 7, 4) == [2, 5, 7, 9]


def test_a_group_larger_than_the_model_shrinks_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert window([0, 1, 3], 1, 8) == [0, 1, 3]
    assert "shrunk to the 3" in caplog.text


def test_layers_of_several_attention_types_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        fuse(subject("gemma3"))
    assert "changes its role" in caplog.text


def _narrower(model):
    path = Anatomy.of(model).layers[1].feed_forward.path
    apply(model, KeepNeurons(path=path, size=32), keep=torch.arange(32))


def _quantised(model):
    apply(model, QuantiseLinear(path=next(iter(Anatomy.of(model).roles))))


def _masked(model):
    path = next(iter(Anatomy.of(model).roles))
    apply(model, MaskWeights(path=path), mask=torch.ones(model.base_model.get_submodule(path).weight.shape).bool())


def _shared(model):
    layers = Anatomy.of(model).layers
    layers[2].module.mlp.down_proj.weight = layers[0].module.mlp.down_proj.weight


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_narrower, ["mlp.gate_proj is [32, 32] in layers.1", "[64, 32] in layers.0"]),
        (_quantised, ["layers.0", "QuantisedLinear", "before masking or quantising"]),
        (_masked, ["layers.0", "MaskedLinear", "before masking"]),
        (_shared, ["layers.2 shares weights"]),
    ],
    ids=["widths", "quantised", "masked", "shared"],
)
def test_blocks_that_are_not_alike_are_refused_before_any_work(change, words):
    of = subject("llama")
    change(of.model)
    with pytest.raises(LeanError) as caught:
        get("fusegpt").check(of, SMALL)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_refusals():
    info, t5 = get("fusegpt"), Anatomy.of(TINY["t5"]())
    assert "an encoder and a decoder" in info.unsuitable(t5, None, SMALL)
    assert "leave at least one" in info.unsuitable(decoder().anatomy, None, {"sparsity": 0.9})
    for settings in ({"sparsity": 1.0}, {"sparsity": -0.1}, {"loss": "kl_dim0", "batch_size": 1}, {"group": 1}):
        with pytest.raises(LeanError):
            info.build(settings)
    assert info.unsuitable(encoder().anatomy, None, {}) is None
