"""The real tokens of a padded batch, found and written back in one kernel each."""

from __future__ import annotations

import pytest
import torch
from interpreting import interpret, needs_triton

interpret()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def marks(batch, length):
    random = torch.Generator().manual_seed(batch)
    mask = torch.rand(batch, length, generator=random) < 0.5
    mask[0] = True
    mask[batch // 2 : batch // 2 + 1] = batch == 1  # an empty row, where there are several
    return mask.to(DEVICE)


@needs_triton
@pytest.mark.parametrize(
    ("batch", "length", "most"), [(5, 64, 200), (1, 64, 64), (70, 128, 5000), (70, 128, 900), (3, 192, 100), (2, 5, 9)]
)
def test_places_are_those_of_real_tokens_in_order(batch, length, most):
    from leanformers.kernels.places_triton import find, numbers, takes

    mask = marks(batch, length)
    counted = torch.full((1,), -1, dtype=torch.int64, pin_memory=DEVICE == "cuda")
    assert takes(mask)
    places, ranks, edges = find(mask, most, counted)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    want = mask.reshape(-1).nonzero()[:, 0]
    padded = want.new_zeros(most)
    padded[: len(want)] = want[:most]
    assert torch.equal(places, padded)
    assert torch.equal(ranks.reshape(-1)[want].long(), torch.arange(len(want), device=DEVICE))
    assert bool((ranks[~mask] == -1).all())
    assert edges.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert numbers(int(counted)) == (len(want), int(mask.sum(1).max()))


@needs_triton
@pytest.mark.parametrize("features", [1, 40, 768, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_spread_stands_where_it_stood(features, dtype):
    from leanformers.kernels.places_triton import find, spread

    mask = marks(7, 40)
    tokens, width = int(mask.sum()), 37
    _, ranks, _ = find(mask, 280, torch.empty(1, dtype=torch.int64, device=DEVICE))
    packed = torch.randn(tokens + 5, features, device=DEVICE).to(dtype)
    want = packed.new_zeros(7 * 40, features)
    want[mask.reshape(-1)] = packed[:tokens]
    assert torch.equal(spread(packed, ranks, tokens, width), want.view(7, 40, features)[:, :width])


@needs_triton
def test_too_large_masks_are_left_to_others():
    from leanformers.kernels.places_triton import takes

    shapes = {(64, 2048): True, (512, 512): True, (0, 64): False, (4096, 64): False, (2, 16384): False, (3, 0): False}
    assert {shape: takes(torch.empty(shape, device="meta")) for shape in shapes} == shapes
