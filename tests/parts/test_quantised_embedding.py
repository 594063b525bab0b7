import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from leanformers.errors import LeanError
from leanformers.parts import QuantisedEmbedding, TiedQuantisedEmbedding, TiedQuantisedHead
from leanformers.parts.quantised_embedding import embedding_factor

pytest.importorskip("torchao")
VOCABULARY, WIDTH = 30, 16
IDS = torch.tensor([[1, 7, 29], [0, 7, 3]])


class Tiny(nn.Module):
    """Token embeddings and a head tied to them, as in a language model."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings: nn.Module = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.head: nn.Module = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        self.head.weight = self.embeddings.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embeddings(ids).tanh())


def quantised(model: Tiny, filled: bool = True) -> Tiny:
    table, head = model.embeddings, model.head
    model.embeddings = QuantisedEmbedding.like(table)
    model.head = TiedQuantisedHead.like(head, model.embeddings)
    if filled:
        model.embeddings.carry(table)
        model.head.carry(head)
    return model


def test_rows_are_those_of_the_dequantised_matrix() -> None:
    old, part = Tiny().embeddings, quantised(Tiny()).embeddings
    assert torch.equal(part(IDS), part.dequantise()[IDS])
    assert ((old.weight - part.weight).abs() <= part.scale * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("bias", [False, True])
def test_the_head_is_the_product_with_the_same_rows(bias: bool) -> None:
    model = quantised(Tiny(bias))
    hidden_states = torch.randn(2, 3, WIDTH)
    outputs = nn.functional.linear(hidden_states, model.embeddings.weight, model.head.bias)
    torch.testing.assert_close(model.head(hidden_states), outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(IDS), Tiny(bias)(IDS), rtol=0.05, atol=0.05)


def test_the_rows_are_saved_once() -> None:
    assert set(quantised(Tiny()).state_dict()) == {"embeddings.qdata", "embeddings.scale"}
    assert set(quantised(Tiny(bias=True)).state_dict()) == {
        "embeddings.qdata",
        "embeddings.scale",
        "head.bias",
    }


@pytest.mark.parametrize("bias", [False, True])
def test_reload_is_exact(bias: bool, tmp_path: Path) -> None:
    model = quantised(Tiny(bias))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        again = quantised(Tiny(bias), filled=False)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    assert torch.equal(again(IDS), model(IDS))


def test_a_copy_is_tied_to_itself() -> None:
    model = quantised(Tiny())
    twin = copy.deepcopy(model)
    assert twin.head.source is twin.embeddings and twin.embeddings is not model.embeddings
    twin.embeddings.qdata.zero_()
    assert not twin(IDS).any() and model(IDS).any()


def test_dtype_moves_the_result_and_not_the_rows() -> None:
    model = quantised(Tiny()).to(torch.bfloat16)
    assert model(IDS).dtype == model.head.weight.dtype == torch.bfloat16
    assert model.embeddings.scale.dtype == torch.float32
    assert torch.equal(model.to(torch.float32)(IDS), quantised(Tiny())(IDS))


def test_gradients_reach_the_hidden_states() -> None:
    model, hidden_states = quantised(Tiny()), torch.randn(4, WIDTH, requires_grad=True)
    model.head(hidden_states).sum().backward()
    torch.testing.assert_close(hidden_states.grad, model.head.weight.sum(dim=0).expand(4, WIDTH))


def test_compiled_and_exported_say_the_same() -> None:
    model = quantised(Tiny()).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(model, (IDS,)).module()
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS), model(IDS))
        torch.testing.assert_close(exported(IDS), model(IDS))


def test_a_second_embedding_reads_the_same_rows() -> None:
    table = quantised(Tiny()).embeddings
    second = TiedQuantisedEmbedding(table, factor=4.0)
    assert torch.equal(second(IDS), 4 * table(IDS))
    assert not second.state_dict()


def test_scaled_embeddings_keep_their_factor() -> None:
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    for make in (BartScaledWordEmbedding, Gemma3TextScaledWordEmbedding):
        old = make(VOCABULARY, WIDTH, 0, embed_scale=4.0)
        part = QuantisedEmbedding.like(old)
        part.carry(old)
        assert embedding_factor(old) == part.factor == 4.0
        torch.testing.assert_close(part(IDS), old(IDS), rtol=0.02, atol=0.1)


def test_bad_input_is_refused() -> None:
    with pytest.raises(LeanError, match="Linear"):
        QuantisedEmbedding.like(nn.Linear(3, 3))
    with pytest.raises(LeanError, match="Embedding"):
        QuantisedEmbedding.like(nn.Embedding(5, 3, max_norm=1.0))
    with pytest.raises(LeanError, match="cannot be tied"):
        TiedQuantisedHead.like(nn.Linear(WIDTH, 5), quantised(Tiny()).embeddings)
