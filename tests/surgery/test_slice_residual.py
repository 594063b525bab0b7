"""Slicing the residual stream: the small model is the large one with norms that see the kept dimensions alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

from families import TINY, inputs, outputs
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.surgery import KeepHeads, MaskWeights, QuantiseEmbeddings, QuantiseLinear, SliceResidual, apply, tier

FIXED = ("wav2vec2", "wav2vec2-stable", "dinov2", "dinov2-swiglu", "audio-spectrogram-transformer")
"""Families whose convolution or classifier holds the stream at its whole width."""
CASES = [(name, head) for name, tiny in TINY.items() for head in (*tiny.heads, "base")]
KEEP = torch.tensor([0, 1, 2, 4, 5, 7, 8, 9, 11, 12, 13, 14, 17, 18, 20, 21, 22, 23, 24, 26, 28, 29, 30, 31])


class Restricted(nn.Module):
    """A norm over the kept dimensions alone; the others come out as zeros."""

    def __init__(self, norm: Any, keep: torch.Tensor) -> None:
        super().__init__()
        self.norm, self.keep, self.rms = norm, keep, not isinstance(norm, nn.LayerNorm)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        norm, x = self.norm, states[..., self.keep]
        if not self.rms:
            x = nn.functional.layer_norm(x, (len(self.keep),), norm.weight[self.keep], norm.bias[self.keep], norm.eps)
        else:
            eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
            gain = norm.weight[self.keep] + ("Gemma" in type(norm).__name__)
            x = gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return torch.zeros_like(states).index_copy(-1, self.keep, x)


def restrict(model: Any, keep: torch.Tensor) -> None:
    """Make the model one that works on the kept dimensions alone, without cutting anything."""
    anatomy = Anatomy.of(model)
    width = anatomy.hidden_size
    gone = torch.tensor(sorted(set(range(width)) - set(keep.tolist())))
    norms = {id(norm.module): norm.module for norm in anatomy.norms if norm.place != "scale"}
    for module in model.modules():  # those of masked language models' transforms
        if isinstance(module, nn.LayerNorm) and module.normalized_shape == (width,):
            norms[id(module)] = module
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in norms and child.weight.shape == (width,):
                setattr(parent, name, Restricted(child, keep))
    with torch.no_grad():
        for reader in [*anatomy.residual.reads, *anatomy.residual.outputs.values()]:
            weight = reader.module.weight.t() if reader.transposed else reader.module.weight
            weight[:, gone] = 0
        head = anatomy.head
        if head is not None and getattr(head, "in_features", None) == width:
            head.weight[:, gone] = 0


@pytest.mark.parametrize(("name", "head"), CASES)
def test_the_small_model_is_the_restricted_large_one(name, head):
    small, large = TINY[name](head=head), TINY[name](head=head)
    if Anatomy.of(small).residual.fixed_width:
        assert name in FIXED
        with pytest.raises(LeanError, match="works on the whole width of the residual stream"):
            apply(small, SliceResidual(size=24), keep=KEEP)
        return
    apply(small, SliceResidual(size=24), keep=KEEP)
    restrict(large, KEEP)
    batch = inputs(large, padded=True)
    expected, found = outputs(large, batch), outputs(small, batch)
    if found.shape != expected.shape:
        expected = expected[..., KEEP]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert Anatomy.of(small).tied == Anatomy.of(large).tied


@pytest.mark.parametrize(
    ("config", "head"),
    [("Bert", "ForTokenClassification"), ("Roberta", "ForQuestionAnswering"), ("Llama", "ForTokenClassification")],
)
def test_heads_of_other_tasks_read_the_stream_too(config, head):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = getattr(T, f"{config}{head}")(getattr(T, f"{config}Config")(**sizes, vocab_size=96)).eval()
    apply(model, SliceResidual(size=24), keep=KEEP)
    result = model(torch.arange(5, 15)[None])
    assert torch.isfinite(result[0]).all()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "phi3", "vit"])
def test_widths_that_a_config_can_say_are_stock(name, tmp_path):
    model = apply(TINY[name](), SliceResidual(size=24), keep=KEEP)
    assert tier(model) == "stock" and Anatomy.of(model).hidden_size == 24
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.hidden_size == 24
    batch = inputs(model)
    assert torch.equal(outputs(again, batch), outputs(model, batch))


def test_the_rotary_table_of_a_head_without_a_size_of_its_own_stays(tmp_path):
    model = apply(TINY["gpt-neox"](), SliceResidual(size=24), keep=KEEP)
    assert tier(model) == "lean" and model.config.hidden_size == 32
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    batch = inputs(model)
    assert torch.equal(outputs(again, batch), outputs(model, batch))


def test_what_cannot_be_cut_is_refused_and_nothing_changes():
    for first, words in (
        (QuantiseLinear(path="layers.1.mlp.down_proj"), "down_proj is quantised"),
        (QuantiseEmbeddings(), "QuantisedEmbedding: slice the residual stream before"),
    ):
        pytest.importorskip("torchao")
        model = apply(TINY["llama"](), first)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(LeanError, match=words):
            apply(model, SliceResidual(size=24), keep=KEEP)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(LeanError, match="is 16 wide, which would not be told"):
        apply(TINY["electra"](), SliceResidual(size=16), keep=torch.arange(16))
    with pytest.raises(LeanError, match="Which 24 of 32"):
        apply(TINY["bert"](), SliceResidual(size=24))


def test_slices_add_up_and_heads_can_go_afterwards():
    twice, once = TINY["bert"](), TINY["bert"]()
    apply(twice, SliceResidual(size=28), keep=torch.arange(28))
    apply(twice, SliceResidual(size=24), keep=torch.arange(4, 28))
    apply(once, SliceResidual(size=24), keep=torch.arange(4, 28))
    for model in (twice, once):
        apply(model, KeepHeads(path="encoder.layer.0.attention.self", size=2), keep=torch.tensor([0, 3]))
    batch = inputs(once, padded=True)
    assert torch.equal(outputs(twice, batch), outputs(once, batch))


def test_whole_groups_of_a_mask_can_go_and_reload(tmp_path):
    model = TINY["llama"]()
    mask = torch.tensor([True, True, False, False]).repeat(64, 8)
    apply(model, MaskWeights(path="layers.0.mlp.up_proj", pattern="2:4"), mask=mask)
    apply(model, SliceResidual(size=24), keep=torch.arange(8, 32))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    batch = inputs(model)
    assert torch.equal(outputs(again, batch), outputs(model, batch))
