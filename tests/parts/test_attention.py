"""The attention dispatcher: SDPA to the bit without a mixer, the mixer's output with one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from leanformers.parts.attention import register

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 96,
}


class Mean(nn.Module):
    """Averages the values of the real tokens: attention without scores."""

    def forward(self, query, key, value, *, padding, causal, scaling, dropout, position_bias, mask):
        real = torch.ones(value.shape[0], value.shape[2]) if padding is None else padding.float()
        mean = (value * real[:, None, :, None]).sum(2, keepdim=True) / real.sum(1)[:, None, None, None]
        return mean.expand_as(query).transpose(1, 2)


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES)).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    return {"input_ids": torch.randint(5, 96, (2, 9)), "attention_mask": mask}


@pytest.mark.parametrize("make", [bert, llama])
def test_without_a_mixer_it_is_sdpa_to_the_bit(make, batch):
    model = make()
    model.set_attn_implementation("sdpa")
    expected = model(**batch)[0]
    model.set_attn_implementation(register())
    assert torch.equal(model(**batch)[0], expected)


def test_a_mixer_sees_only_real_tokens(batch):
    model = bert()
    for layer in model.encoder.layer:
        layer.attention.self.mixer = Mean()
    model.set_attn_implementation(register())
    padded = model(**batch)[0][0, :6]
    alone = model(input_ids=batch["input_ids"][:1, :6])[0][0]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)


def test_mixers_may_differ_per_layer(batch):
    model = bert()
    model.set_attn_implementation(register())
    before = model(**batch)[0]
    model.encoder.layer[1].attention.self.mixer = Mean()
    assert not torch.allclose(model(**batch)[0], before)
