"""Parameters, bytes and FLOPs agree with what can be counted by hand."""

from __future__ import annotations

import copy
import subprocess

import pytest
import torch
from torch import nn

from leanformers.errors import LeanError
from leanformers.measure.cost import (
    bytes_in_memory,
    bytes_of_state,
    bytes_on_disk,
    count_flops,
    nbytes,
    parameters,
)

ROWS, LENGTH = 3, 11


def ids(length: int = LENGTH) -> dict[str, torch.Tensor]:
    made = torch.randint(1, 50, (ROWS, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": made, "attention_mask": torch.ones_like(made)}


def flops(model: nn.Module, batch: dict[str, torch.Tensor] | None = None) -> int:
    return count_flops(lambda: model(**(batch or ids())), model).total


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [1, 11, 32])
def test_bert_is_the_closed_formula(make, attention, length):
    model = make["bert"](attention=attention)
    d, layers = 32, 2
    blocks = layers * length * (24 * d * d + 4 * length * d)
    head = 2 * d * d + 2 * d * 2  # pooler and classifier see one position
    assert flops(model, ids(length)) == ROWS * (blocks + head)


@pytest.mark.parametrize("padded", [False, True])
def test_llama_with_grouped_heads_is_the_closed_formula(make, padded):
    d, kv, f, vocab, layers = 32, 16, 48, 50, 2
    batch = ids()
    if padded:
        batch["attention_mask"][0, 5:] = 0
    per_token = 2 * (2 * d * d + 2 * d * kv + 3 * d * f) + 4 * LENGTH * d
    expected = ROWS * LENGTH * (layers * per_token + 2 * d * vocab)
    rotary = 2 * LENGTH * 8  # some versions compute the angles by a product of matrices, once
    assert 0 <= flops(make["llama"](), batch) - expected <= rotary


def test_sdpa_counts_what_eager_counts(make):
    assert flops(make["llama"]("sdpa")) == pytest.approx(flops(make["llama"]("eager")), rel=1e-3)


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_layers_cost_the_same_flops_and_fewer_bytes(make, config):
    quantization = pytest.importorskip("torchao.quantization")
    plain = make["bert"]()
    quantised = copy.deepcopy(plain)
    quantization.quantize_(quantised, getattr(quantization, config)())
    assert flops(quantised) == flops(plain)
    assert parameters(quantised) == parameters(plain)
    linears = sum(m.weight.numel() for m in plain.modules() if isinstance(m, nn.Linear))
    saved = bytes_of_state(plain) - bytes_of_state(quantised)
    assert 2 * linears < saved < 3 * linears  # one byte and a scale per row instead of four bytes
    assert nbytes(quantised.bert.encoder.layer[0].attention.self.query.weight) < 2 * 32 * 32


def test_a_kernel_that_the_counter_cannot_see_is_counted_by_shape():
    class Opaque(nn.Module):
        in_features, out_features = 8, 4

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x[..., None, :] * self.weight).sum(-1)

    model = nn.Sequential(nn.Linear(8, 8), Opaque())
    count = count_flops(lambda: model(torch.randn(5, 8)), model)
    assert count.by_shape == ("1",)
    assert count.total == 2 * 5 * (8 * 8 + 8 * 4)
    assert not model[1]._forward_hooks and not model[1]._forward_pre_hooks


def test_vectors_count_too():
    matrix, vector = torch.randn(4, 8), torch.randn(8)
    holder = nn.Identity()
    assert count_flops(lambda: matrix @ vector, holder).total == 2 * 4 * 8
    assert count_flops(lambda: vector @ vector, holder).total == 2 * 8


def test_tied_weights_count_once(make):
    tied, loose = make["llama"](tied=True), make["llama"](tied=False)
    head = loose.lm_head.weight.numel()
    assert parameters(loose) - parameters(tied) == head
    assert bytes_of_state(loose) - bytes_of_state(tied) == 4 * head
    assert bytes_in_memory(loose) - bytes_in_memory(tied) == 4 * head


def test_two_parameters_over_one_memory_count_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = nn.Parameter(first.weight.data)
    model = nn.Sequential(first, second)
    assert bytes_of_state(model) == bytes_in_memory(model) == 64


def test_a_model_without_weights_has_its_bytes_too(make):
    with torch.device("meta"):
        empty = make["llama"]()
    assert bytes_of_state(empty) == bytes_of_state(make["llama"]())


def test_buffers_are_bytes_and_only_quantised_weights_among_them_are_parameters():
    model = nn.Module()
    model.register_buffer("qdata", torch.zeros(4, 6, dtype=torch.int8))
    model.register_buffer("mask_bits", torch.zeros(9, dtype=torch.uint8))
    model.register_buffer("position_ids", torch.zeros(1, 5, dtype=torch.int64), persistent=False)
    assert parameters(model) == 24
    assert bytes_of_state(model) == 24 + 9
    assert bytes_in_memory(model) == 24 + 9 + 40


def test_dtype_counts(make):
    model = make["bert"]()
    full = bytes_of_state(model)
    assert bytes_of_state(model.bfloat16()) * 2 == full


def test_a_saved_folder_has_the_bytes_of_the_state(make, tmp_path):
    model = make["llama"]()
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 10)
    (tmp_path / "vocab.txt").write_bytes(b"x" * 5)
    (tmp_path / "optimizer.pt").write_bytes(b"x" * 1000)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "model.safetensors").write_bytes(b"x" * 1000)
    sizes = bytes_on_disk(tmp_path)
    tensors = len(model.state_dict())
    header = sizes.weights - bytes_of_state(model)
    assert 0 < header < 200 * tensors
    assert sizes.tokenizer == 15
    assert sizes.other > 1000


def test_bytes_are_those_of_du_and_zeros_count_in_full(make, tmp_path):
    """What a user sees: the weight file as du shows it. Masked weights are stored like others, each mask beside."""
    from leanformers.methods import Subject, get

    plain, masked = make["llama"](), Subject(model=make["llama"]())
    get("essential-sparsity").build({"sparsity": 0.9})(masked)
    sizes = []
    for name, model in (("plain", plain), ("masked", masked.model)):
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        shown = subprocess.run(["du", "--apparent-size", "--bytes", file], capture_output=True, text=True, check=True)
        sizes.append(bytes_on_disk(tmp_path / name).weights)
        assert sizes[-1] == int(shown.stdout.split()[0])
    assert sizes[1] > sizes[0]
    assert parameters(masked.model) == parameters(plain)


def test_only_one_format_counts(tmp_path):
    """A folder of the hub holds the same weights several times."""
    sizes = {
        "model.safetensors": 100,
        "pytorch_model.bin": 90,
        "onnx/model.onnx": 80,
        "2_Dense/model.safetensors": 7,
        "training/train-0/checkpoint-3/model.safetensors": 60,
        "training_args.bin": 50,
        "sentencepiece.bpe.model": 5,
    }
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    found = bytes_on_disk(tmp_path)
    assert (found.weights, found.tokenizer, found.other) == (107, 5, 90 + 80 + 50)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "2_Dense/model.safetensors").unlink()
    assert bytes_on_disk(tmp_path).weights == 90


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(LeanError, match="not a folder"):
        bytes_on_disk(tmp_path / "nothing")
    with pytest.raises(LeanError, match="no weight file"):
        bytes_on_disk(tmp_path)


def test_a_graph_counts_in_an_exported_folder_alone(tmp_path):
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "openvino_model.bin").write_bytes(b"x" * 40)
    (tmp_path / "openvino" / "openvino_model.xml").write_bytes(b"x" * 5)
    with pytest.raises(LeanError, match="no weight file"):
        bytes_on_disk(tmp_path)
    (tmp_path / "export.json").write_text("{}")
    assert bytes_on_disk(tmp_path).weights == 45
    (tmp_path / "export.json").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 90)  # a graph beside them is another format
    assert bytes_on_disk(tmp_path).weights == 90
