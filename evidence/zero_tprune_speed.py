"""How fast Zero-TPrune makes models of DeiT-S's and DeiT-B's shape at 65 % of their layers' FLOPs, beside dense ones.

Weights are random: time does not depend on them. On a GPU in bfloat16 at batch 64 and 256, eager, replayed from a CUDA
graph, and compiled and replayed, dense and pruned alike, with the kernels that choose (`kernels.token_votes`) and with
the plain rule; and how often both keep the same tokens. On a CPU in float32 at batch 1 and 32, DeiT-S, eager. Models
take turns in each round, and ratios are medians over the rounds. While a graph is recorded, transformers gives each
attention a mask that the dense model does not need and is much slower with; not here.

    python evidence/zero_tprune_speed.py             # writes zero-tprune-gpu.json, or zero-tprune-cpu.json without one
    python evidence/zero_tprune_speed.py --small     # a dry run
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from transformers import ViTConfig, ViTForImageClassification

from claim import Evidence, arguments
from common import device
from leanformers.anatomy import Anatomy
from leanformers.kernels import token_votes
from leanformers.methods.run.zero_tprune import ZeroTPrune
from leanformers.packing.graphs import Replay
from leanformers.parts.token_reducers import reduction
from leanformers.surgery import apply

SHARE = 0.65
CAUSE = (
    "choosing takes launches and traffic of its own, gathering breaks up fused layers, and a third fewer tokens fill a "
    "fast GPU less well; beside the plain rule the kernels gain in every case. In half precision nearly equal scores "
    "fall out either way, and what an early place decides differently goes on to the later ones"
)
CAUSE_ON_CPU = "with one image a layer takes little time, so that choosing, in many small operations, weighs more"
SHAPES = {"DeiT-S": (384, 6), "DeiT-B": (768, 12)}  # width, heads
START = time.perf_counter()
Call = Callable[[], Any]


def made(shape: str, small: bool) -> tuple[Any, Any]:
    """Dense and pruned."""
    width, heads = SHAPES[shape]
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 4 if small else 12, "image_size": 64 if small else 224}
    # Wider weights than at the start of a training, lest attention be as good as uniform.
    config: Any = ViTConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, initializer_range=0.06, **sizes
    )
    dense: Any = ViTForImageClassification(config).eval().to(device())
    if device() == "cuda":
        dense.to(torch.bfloat16)
    pruned = copy.deepcopy(dense)
    apply(pruned, ZeroTPrune(flops=0.8 if small else SHARE)._edit(Anatomy.of(pruned)))
    return dense, pruned.eval()


def images(model: Any, batch: int) -> torch.Tensor:
    config = model.config
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(batch, config.num_channels, config.image_size, config.image_size, generator=generator)
    return pixels.to(device(), model.dtype)


def plain() -> Any:
    """Inside, the kernels stand aside."""
    return patch.multiple(token_votes, fits=lambda *_: False, ranks=lambda *_: False)


def eager(model: Any, pixels: torch.Tensor) -> Call:
    return lambda: model(pixels).logits


def replayed(call: Call) -> Call:
    return Replay(call, None, on_gpu=device() == "cuda")


def compiled(model: Any, pixels: torch.Tensor) -> Call:
    torch.compiler.reset()
    fast = torch.compile(lambda: model(pixels).logits, dynamic=False)
    fast()
    return replayed(fast)


def clock(call: Call, repeats: int) -> float:
    """Seconds of one call."""
    if device() == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def in_turns(calls: dict[str, Call], small: bool, rounds: int = 15, repeats: int = 5) -> dict[str, Any]:
    """Milliseconds of each, and how many times as fast as the first each is."""
    rounds, repeats = (2, 1) if small else (rounds, repeats)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        clock(call, 2)
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(clock(call, repeats))
    first = next(iter(seconds.values()))
    gain = {n: median(a / b for a, b in zip(first, own, strict=True)) for n, own in seconds.items()}
    return {"milliseconds": {name: 1e3 * median(own) for name, own in seconds.items()}, "times as fast": gain}


def alike(pruned: Any, pixels: torch.Tensor) -> dict[str, float]:
    """Share of the tokens that kernels and plain rule both keep, at the first place and at the last."""
    found = []
    for inside in (False, True):
        if inside:
            with plain():
                pruned(pixels)
        else:
            pruned(pixels)
        shared = reduction(pruned)
        assert shared is not None
        kept = (shared.left[place].index for place in sorted(shared.left))
        found.append([index for index in kept if index is not None])
    told = {}
    for name, place in (("first", 0), ("last", -1)):
        one, other = found[0][place], found[1][place]
        told[name] = float((one[:, :, None] == other[:, None, :]).any(-1).float().mean())
    return told


def on_gpu(shape: str, batch: int, small: bool) -> dict[str, Any]:
    dense, pruned = made(shape, small)
    pixels = images(dense, batch)
    told: dict[str, Any] = {"kept alike": alike(pruned, pixels)}
    told["eager"] = in_turns({"dense": eager(dense, pixels), "pruned": eager(pruned, pixels)}, small)
    calls = {"dense": replayed(eager(dense, pixels)), "pruned": replayed(eager(pruned, pixels))}
    with plain():
        calls["pruned by the plain rule"] = replayed(eager(pruned, pixels))
    told["graph"] = in_turns(calls, small)
    return told


def on_gpu_compiled(shape: str, batch: int, small: bool) -> dict[str, Any]:
    dense, pruned = made(shape, small)
    pixels = images(dense, batch)
    return {"compiled, graph": in_turns({"dense": compiled(dense, pixels), "pruned": compiled(pruned, pixels)}, small)}


def on_cpu(shape: str, batch: int, small: bool) -> dict[str, Any]:
    dense, pruned = made(shape, small)
    pixels = images(dense, batch)
    calls = {"dense": eager(dense, pixels), "pruned": eager(pruned, pixels)}
    return {"eager": in_turns(calls, small, 9, 8 if batch == 1 else 1)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=330.0, help="after which nothing new is compiled")
    given = parser.parse_args()
    gpu, small = device() == "cuda", given.small
    batches = (2, 3) if small else (64, 256) if gpu else (1, 32)
    cases = [(shape, batch) for batch in batches for shape in (SHAPES if gpu or small else ("DeiT-S",))]
    with (
        torch.no_grad(),
        patch("transformers.masking_utils.is_tracing", lambda *_: False),
        Evidence(
            "zero-tprune-gpu" if gpu else "zero-tprune-cpu",
            claim="At 65% of its layers' FLOPs, scoring included, a DeiT is at least 1.2 times as fast on a "
            + ("GPU, both replayed from CUDA graphs, as it is and compiled" if gpu else "CPU"),
            paper="Wang, Dedhia, Jha (2024), Zero-TPrune",
            folder=given.results,
        ) as evidence,
    ):
        for run in (on_gpu, on_gpu_compiled) if gpu else (on_cpu,):
            for shape, batch in cases:
                if run is on_gpu_compiled and time.perf_counter() - START > given.seconds:
                    continue
                case = f"{shape}, batch {batch}"
                told = run(shape, batch, small)
                print(f"{time.perf_counter() - START:.0f} s: {case}: {told}", flush=True)
                evidence.result.setdefault(case, {}).update(told)
        evidence.baseline = {
            f"{case}, {way}: milliseconds": times["milliseconds"]["dense"]
            for case, told in evidence.result.items()
            for way, times in told.items()
            if way != "kept alike"
        }
        for way in ("graph", "compiled, graph") if gpu else ("eager",):
            for case, told in evidence.result.items():
                if way in told:
                    gain = told[way]["times as fast"]["pruned"]
                    evidence.check(f"{case}, {way}: times as fast as dense", gain, ">= 1.2")
        if gpu:
            assert token_votes.fits(*[torch.empty(1, 1, 8, 64, device="cuda", dtype=torch.bfloat16)] * 2)
            least = min(told["kept alike"]["last"] for told in evidence.result.values())
            evidence.check("Tokens that kernels and plain rule both keep in the end, share, least", least, ">= 0.95")
        if not evidence.holds:
            evidence.cause = CAUSE if gpu else CAUSE_ON_CPU


if __name__ == "__main__":
    main()
