"""A linear and the GELU after it in one kernel, for inference on a GPU: ByteTransformer's fused bias and activation.

Zhai et al. (2023, arXiv 2210.03052, section on kernel fusion). The activation of a feed-forward layer is its largest
tensor; unfused it is written, read and written again. The exact form is computed (by erf), as PyTorch's default does.

Whether the kernel beats a library's product with an activation after it depends on sizes and GPU, so both are timed
where they are to run and as they are (launched, or replayed from a CUDA graph), once for each size (tokens to a power
of two), and the fastest is used from then on. The time of that is some tenths of a second.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import gelu, linear

from leanformers.kernels.processors import runs_triton

if TYPE_CHECKING:
    from leanformers.kernels.linear_gelu_triton import Tiles

_HALF = (torch.float16, torch.bfloat16)
# The fastest ones on an H100 of some twenty, at 1,472 to 19,456 tokens and 768 and 1,024 features.
_SHAPES = (
    (128, 256, 64, 8, 3, True),
    (128, 128, 64, 8, 4, True),
    (128, 128, 64, 4, 2, False),
    (128, 128, 64, 4, 3, False),
    (64, 64, 64, 4, 4, False),  # for what comes before Hopper
)
_ROUNDS, _RUNS = 5, 8
_Key = tuple[int, int, int, torch.dtype, torch.device, bool]
_fastest: dict[_Key, Tiles | None] = {}  # None: the library's product and an activation after it


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, replayed: bool = False) -> torch.Tensor:
    """gelu(x @ weight.T + bias), without gradients on a GPU.

    Args:
        x: [..., in_features]. weight: [out_features, in_features]. bias: [out_features].
        replayed: it is to run in a CUDA graph, so the time to launch does not count.

    Returns:
        [..., out_features].
    """
    if fits(x, weight):
        return _op(x, weight, bias, replayed)
    return reference(x, weight, bias)


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch, with gradients."""
    return gelu(linear(x, weight, bias))


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel can do it: half precision on a GPU, no gradients, rows of 16 bytes."""
    if x.device.type != "cuda" or x.dtype not in _HALF or weight.dtype != x.dtype:
        return False
    if weight.shape[0] % 8 or weight.shape[1] % 8:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    return runs_triton(x.device) and not torch.is_autocast_enabled("cuda")


@torch.library.custom_op("leanformers::linear_gelu", mutates_args=())
def _op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, replayed: bool) -> torch.Tensor:
    """As one operation, so that the choice breaks no graph."""
    from leanformers.kernels.linear_gelu_triton import launch

    flat = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.cuda.device_of(x):
        tiles = choose(flat, weight, bias, replayed)
        out = reference(flat, weight, bias) if tiles is None else launch(flat, weight.contiguous(), bias, tiles)
    return out.view(*x.shape[:-1], weight.shape[0])


@_op.register_fake
def _(x, weight, bias, replayed):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def choose(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, replayed: bool = False) -> Tiles | None:
    """What was measured to be the fastest for sizes like these, measured now if it was not; None: no kernel of ours."""
    key = (x.shape[0].bit_length(), *weight.shape, x.dtype, x.device, replayed)
    if key not in _fastest:
        if x.shape[0] == 0 or torch.cuda.is_current_stream_capturing():
            return None  # nothing to measure by, or no way to
        _fastest[key] = _measured(x, weight, bias, replayed)
    return _fastest[key]


def _measured(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, replayed: bool) -> Tiles | None:
    from leanformers.kernels.linear_gelu_triton import Tiles, launch

    ways: dict[Tiles | None, Callable[[], None]] = {None: _again(partial(reference, x, weight, bias), replayed)}
    for tiles in (Tiles(*shape) for shape in _SHAPES):
        way = partial(launch, x, weight, bias, tiles)
        try:
            way()
        except Exception:  # too large for this GPU's shared memory, or not for its compiler
            continue
        ways[tiles] = _again(way, replayed)
    seconds: dict[Tiles | None, list[float]] = {tiles: [] for tiles in ways}
    for _ in range(_ROUNDS):
        for cut, run in ways.items():
            seconds[cut].append(_milliseconds(run))
    return min(seconds, key=lambda cut: statistics.median(seconds[cut]))


def _again(way: Callable[[], torch.Tensor], replayed: bool) -> Callable[[], None]:
    """Run it a few times, as it will be run."""

    def runs() -> None:
        for _ in range(_RUNS):
            way()

    runs()  # what it allocates and loads is no part of its time
    if not replayed:
        return runs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runs()
    return graph.replay


def _milliseconds(runs: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    runs()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
