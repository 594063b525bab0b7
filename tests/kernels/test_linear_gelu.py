"""A linear with GELU in one kernel: it is the two, at any size, and gives way where it cannot run."""

from __future__ import annotations

import pytest
import torch
from interpreting import interpret, needs_triton
from torch.nn.functional import gelu, linear

from leanformers.kernels.linear_gelu import fits, linear_gelu

interpret()


def draw(tokens, width, columns, dtype=torch.float32, device="cpu"):
    random = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape, generator=random) for shape in ((tokens, width), (columns, width), (columns,))]
    return [part.to(device, dtype) for part in parts]


@needs_triton
@pytest.mark.parametrize(("tokens", "width", "columns"), [(70, 64, 96), (1, 32, 264), (64, 64, 64), (65, 80, 40)])
@pytest.mark.parametrize("staying", [True, False])
def test_the_kernel_is_a_linear_and_gelu(tokens, width, columns, staying):
    from leanformers.kernels.linear_gelu_triton import Tiles, launch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight, bias = draw(tokens, width, columns, torch.bfloat16 if device == "cuda" else torch.float32, device)
    exact = gelu(linear(x.double(), weight.double(), bias.double()))
    found = launch(x, weight, bias, Tiles(32, 32, 32, 4, 2, staying)).double()
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5 if device == "cpu" else 1e-2)


@needs_triton
def test_the_kernel_is_right_far_out():
    from leanformers.kernels.linear_gelu_triton import Tiles, launch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.zeros(32, 32)
    x[:, 0] = torch.linspace(-30, 30, 32)
    x[:4, 0] = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e30])
    weight, bias = torch.zeros(32, 32), torch.zeros(32)
    weight[:, 0] = 1.0
    x, weight, bias = (part.to(device, dtype) for part in (x, weight, bias))
    found = launch(x, weight, bias, Tiles(32, 32, 32, 4, 2, False)).double()
    exact = gelu(x[:, :1].double()).expand(-1, 32).clone()
    exact[1] = 0  # and no -inf * 0
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=1e-5 if device == "cpu" else 1e-2, equal_nan=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what is faster is measured on a GPU")
def test_what_is_chosen_on_a_gpu_is_exact():
    x, weight, bias = draw(1000, 384, 1536, torch.bfloat16, "cuda")
    exact = gelu(linear(x.double(), weight.double(), bias.double()))
    with torch.no_grad():
        found = linear_gelu(x[None], weight, bias)[0].double()
    torch.testing.assert_close(found, exact, atol=1e-2, rtol=1e-2)


def test_elsewhere_it_is_plain_pytorch_with_gradients():
    x, weight, bias = draw(5, 8, 12)
    weight.requires_grad_()
    assert not fits(x, weight)
    found = linear_gelu(x[None], weight, bias)
    assert torch.equal(found, gelu(linear(x[None], weight, bias)))
    found.sum().backward()
    assert weight.grad is not None
