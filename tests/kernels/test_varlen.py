"""Variable-length attention: the kernel is the loop, the loop is attention, and sequences know nothing of each other."""

from __future__ import annotations

import pytest
import torch
from interpreting import interpret, needs_triton
from torch.nn.functional import scaled_dot_product_attention

from leanformers.errors import LeanError
from leanformers.kernels import varlen_attention
from leanformers.kernels.varlen import BACKENDS, choose, reference, refusal, refusal_of_device, tiles_for

interpret()
LENGTHS = {
    "odd lengths": [33, 1, 70],
    "one token": [1],
    "one sequence": [65],
    "empty sequences": [0, 5, 0, 17, 0],
    "a multiple of the tile": [64, 128],
}


def draw(lengths, heads=4, groups=2, head_dim=16, dtype=torch.float32, spare=0, seed=0):
    """q, k, v as views of one packed projection, and cu_seqlens; `spare` rows belong to no sequence."""
    random = torch.Generator().manual_seed(seed)
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    fused = torch.randn(int(edges[-1]) + spare, heads + 2 * groups, head_dim, generator=random).to(dtype)
    q, k, v = fused.split([heads, groups, groups], dim=1)
    return q, k, v, edges


def alone(q, k, v, edges, causal=False, bias=None):
    """Every sequence by itself through plain softmax."""
    out = torch.zeros(q.shape)
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[low:high].float(), k[low:high].float()) * q.shape[-1] ** -0.5
        length = high - low
        if bias is not None:
            scores = scores + bias[:, :length, :length]
        if causal:
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        out[low:high] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[low:high].float())
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", LENGTHS)
def test_the_reference_is_attention_of_each_sequence_alone(case, causal, biased):
    lengths = LENGTHS[case]
    q, k, v, edges = draw(lengths)
    bias = torch.randn(4, max(lengths) + 3, max(lengths) + 3) if biased else None
    out = varlen_attention(q, k, v, edges, max(lengths), causal=causal, bias=bias, backend="reference")
    torch.testing.assert_close(out, alone(q, k, v, edges, causal, bias), rtol=1e-5, atol=2e-6)


@needs_triton
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", LENGTHS)
def test_the_kernel_is_the_reference(case, causal, biased):
    lengths = LENGTHS[case]
    q, k, v, edges = draw(lengths)
    bias = torch.randn(4, max(lengths), max(lengths)) if biased else None
    settings = {"causal": causal, "bias": bias, "scaling": 0.3}
    out = varlen_attention(q, k, v, edges, max(lengths), **settings, backend="triton")
    torch.testing.assert_close(out, reference(q, k, v, edges, **settings), rtol=1e-5, atol=2e-6)


@needs_triton
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128])
def test_the_kernel_takes_every_head_size_and_half_precision(head_dim):
    q, k, v, edges = draw([37, 2], heads=2, groups=1, head_dim=head_dim)
    exact = reference(q, k, v, edges)
    torch.testing.assert_close(varlen_attention(q, k, v, edges, 37, backend="triton"), exact, rtol=1e-5, atol=2e-6)
    half = varlen_attention(q.half(), k.half(), v.half(), edges, 37, backend="triton")
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=2e-3)


@needs_triton
def test_every_cut_of_the_launch_gives_the_same():
    from leanformers.kernels.varlen_triton import Tiles, launch

    q, k, v, edges = draw([150, 31], heads=1, groups=1)
    exact = reference(q, k, v, edges, causal=True)
    for tiles in (Tiles(128, 64, 8, 3), Tiles(64, 128, 4, 2), Tiles(32, 32, 4, 2), Tiles(16, 64, 4, 2)):
        out = launch(q, k, v, edges, 150, causal=True, scaling=0.25, bias=None, tiles=tiles)
        torch.testing.assert_close(out, exact, rtol=1e-5, atol=2e-6)
    for head_dim in (16, 64, 80, 128):
        for length in (10, 500, 1000, 5000):
            assert tiles_for(head_dim, length, torch.bfloat16).queries >= 16


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_rows_after_the_last_sequence_change_nothing(backend):
    q, k, v, edges = draw([9, 4], spare=3)
    out = varlen_attention(q, k, v, edges, 9, backend=backend)
    assert out.shape == q.shape
    torch.testing.assert_close(out[:13], alone(q, k, v, edges)[:13], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_no_sequence_knows_of_another(backend):
    q, k, v, edges = draw([9, 20, 4])
    before = varlen_attention(q, k, v, edges, 20, backend=backend)
    k, v = k.clone(), v.clone()
    k[9:29], v[9:29] = 100.0, float("nan")
    after = varlen_attention(q, k, v, edges, 20, backend=backend)
    keep = torch.tensor([*range(9), *range(29, 33)])
    assert torch.equal(before[keep], after[keep])


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_nothing_but_empty_sequences(backend):
    q, k, v, edges = draw([0, 0])
    assert varlen_attention(q, k, v, edges, 0, backend=backend).shape == (0, 4, 16)


def test_gradients_flow_through_the_reference():
    q, k, v, edges = draw([5, 0, 3], heads=2, groups=2, spare=1)
    q, k, v = (part.double().requires_grad_() for part in (q.clone(), k.clone(), v.clone()))

    def padded(q, k, v):
        parts = []
        for low, high in ((0, 5), (5, 8)):
            rows = (part[low:high].transpose(0, 1)[None] for part in (q, k, v))
            parts.append(scaled_dot_product_attention(*rows)[0].transpose(0, 1))
        return torch.cat(parts)

    weight = torch.randn(8, 2, 16).double()
    own = torch.autograd.grad((varlen_attention(q, k, v, edges, 5)[:8] * weight).sum(), (q, k, v))
    other = torch.autograd.grad((padded(q, k, v) * weight).sum(), (q, k, v))
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two)


@needs_triton
def test_the_kernel_refuses_gradients():
    q, k, v, edges = draw([5])
    with pytest.raises(LeanError, match="has no gradients"):
        varlen_attention(q.clone().requires_grad_(), k, v, edges, 5, backend="triton")


def test_what_cannot_run_here_says_why(monkeypatch):
    q, k, v, edges = draw([5], head_dim=8)
    with pytest.raises(LeanError, match=f"no backend 'abacus'.*{', '.join(BACKENDS)}"):
        varlen_attention(q, k, v, edges, 5, backend="abacus")
    assert "heads of 16 to 128 numbers, not 8" in str(refusal("triton", q, k, v))
    assert "runs on a GPU, not on 'cpu'" in str(refusal("torch", q, k, v))
    gpu = torch.device("cuda")
    refusal_of_device.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "V100")
    assert "V100 is too old" in str(refusal_of_device("torch", gpu, torch.float16, 64))
    refusal_of_device.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "float16 or bfloat16, not torch.float32" in str(refusal_of_device("torch", gpu, torch.float32, 64))
    assert refusal_of_device("torch", gpu, torch.bfloat16, 64) is None
    refusal_of_device.cache_clear()
    assert choose(q, k) == "reference"


def test_compiled_it_is_one_graph():
    q, k, v, edges = draw([9, 4])
    compiled = torch.compile(varlen_attention, backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(q, k, v, edges, 9), varlen_attention(q, k, v, edges, 9))
