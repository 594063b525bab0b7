"""Packed encoders on a GPU: BERT-base and -large shape in bf16, random weights, against padded and length-sorted ones.

Four batches of each size; lengths uniform on [0.2 S, S], or those of real docstrings (S 512) as `bytetransformer.py`
left them. Everything of a case is timed in turns, in one process, by device events; medians over rounds. The floor is
what a packed forward cannot do without: the model's own linears on the real tokens, and attention by
`torch.nn.attention.varlen`, both replayed from CUDA graphs, so without a launch in it.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from transformers import BertConfig, BertModel

from claim import RESULTS, Evidence, arguments
from leanformers.kernels import varlen_attention
from leanformers.packing import pack

PARSER = arguments(__doc__, small="a dry run on a CPU")
PARSER.add_argument("--seconds", type=float, default=440.0, help="no case is begun after so many")
ARGUMENTS = PARSER.parse_args()
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
POOL, ROUNDS, FEWER = (4, 7, 3) if GPU else (2, 2, 2)
LONG = 64 * 1024  # places of a padded batch from which on fewer rounds do
SHAPES = {"base": (768, 12, 12), "large": (1024, 24, 16)}  # hidden size, layers, heads
if ARGUMENTS.small:
    SHAPES = {"tiny": (64, 2, 2)}
START = time.perf_counter()
Call = Callable[[], Any]


def told(*parts: Any) -> None:
    print(f"[{time.perf_counter() - START:4.0f}s]", *parts, flush=True)


def model_of(shape: str) -> Any:
    width, layers, heads = SHAPES[shape]
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = BertConfig(**sizes, intermediate_size=4 * width, max_position_embeddings=2048)
    model: Any = BertModel(config, add_pooling_layer=False)
    return model.to(DEVICE, DTYPE).eval()


def lengths_of(kind: str, batch: int, length: int) -> list[int]:
    """Of POOL batches as they arrive; the longest uniform one has the full length."""
    count = POOL * batch
    if kind == "docstrings":
        found: list[int] = json.loads((RESULTS / "bytetransformer.json").read_text())["result"]["lengths"]
        return [min(n, length) for n in (found * (count // len(found) + 1))[:count]]
    random = torch.Generator().manual_seed(1)
    return [length, *torch.randint(int(0.2 * length), length + 1, (count - 1,), generator=random).tolist()]


def batches_of(lengths: list[int], batch: int) -> list[dict[str, torch.Tensor]]:
    """Each padded to its own longest."""
    random = torch.Generator().manual_seed(2)
    made = []
    for low in range(0, len(lengths), batch):
        part = torch.tensor(lengths[low : low + batch])
        mask = (torch.arange(int(part.max()))[None] < part[:, None]).long()
        ids = torch.randint(5, 30_000, mask.shape, generator=random) * mask
        made.append({"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)})
    return made


def graphed(call: Call) -> Call:
    """Replayed from a CUDA graph; on a CPU the call itself."""
    if not GPU:
        return call
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(held: Call = call) -> None:
        """Holds the call, and so the tensors that the graph reads."""
        graph.replay()

    return replay


def all_of(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def interleaved(calls: dict[str, Call], rounds: int = ROUNDS) -> dict[str, float]:
    """Milliseconds of each, in turns: the median over rounds after one to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if GPU:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                begin.record()
                calls[name]()
                end.record()
                torch.cuda.synchronize()
                taken[name].append(begin.elapsed_time(end))
            else:
                began = time.perf_counter()
                calls[name]()
                taken[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def heads_of(lengths: list[int], heads: int, head_dim: int) -> tuple[Any, ...]:
    """Random q, k, v [tokens, heads, head_dim] of one batch, cu_seqlens and the longest."""
    edges = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    q, k, v = torch.randn(3, sum(lengths), heads, head_dim, device=DEVICE, dtype=DTYPE)
    return q, k, v, edges, max(lengths)


def floor_of(model: Any, lengths: list[int], batch: int) -> dict[str, Call]:
    """Linears and attention of all layers on the real tokens of every batch of the pool."""
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    linears, attentions = [], []
    for low in range(0, len(lengths), batch):
        part = lengths[low : low + batch]
        x = torch.randn(sum(part), width, device=DEVICE, dtype=DTYPE)
        wide = torch.randn(sum(part), 4 * width, device=DEVICE, dtype=DTYPE)
        q, k, v, edges, longest = heads_of(part, heads, width // heads)

        def run_linears(x: torch.Tensor = x, wide: torch.Tensor = wide) -> None:
            for layer in model.encoder.layer:
                attention = layer.attention
                for linear in (attention.self.query, attention.self.key, attention.self.value, attention.output.dense):
                    linear(x)
                layer.intermediate.dense(x)
                layer.output.dense(wide)

        def run_attention(backend: str, parts: Any = (q, k, v, edges, longest)) -> None:
            for _ in model.encoder.layer:
                varlen_attention(*parts, backend=backend)

        linears.append(graphed(run_linears))
        backends = ("torch", "triton") if GPU else ("reference",)
        attentions.append({backend: graphed(partial(run_attention, backend)) for backend in backends})
    calls: dict[str, Call] = {"linears": partial(all_of, linears)}
    for backend in attentions[0]:
        calls[f"attention, {backend}"] = partial(all_of, [runs[backend] for runs in attentions])
    return calls


def case(ways: dict[str, Any], model: Any, kind: str, batch: int, length: int) -> dict[str, float]:
    """Milliseconds per batch of every way, and what their outputs differ by."""
    lengths = lengths_of(kind, batch, length)
    arriving, ordered = batches_of(lengths, batch), batches_of(sorted(lengths), batch)
    calls: dict[str, Call] = {}
    for name, run in ways.items():
        given = ordered if name.startswith("sorted") else arriving
        calls[name] = partial(all_of, [partial(run, **one) for one in given])
    calls |= floor_of(model, lengths, batch)
    for name, call in calls.items():
        began = time.perf_counter()
        call()
        if (seconds := time.perf_counter() - began) > 2:
            told(f"  {name}: {seconds:.0f}s at first")
    rounds = FEWER if batch * length >= LONG else ROUNDS
    found = {name: value / POOL for name, value in interleaved(calls, rounds).items()}
    found["real"] = sum(lengths) / sum(one["attention_mask"].numel() for one in arriving)
    first = arriving[0]
    real = first["attention_mask"].bool()
    exact = ways["padded"](**first).last_hidden_state
    for name in ("packed", "padded, compiled"):
        other = ways[name](**first).last_hidden_state
        found[f"{name}: difference"] = float((exact - other)[real].abs().max())
    return found


def attention_alone(flex: Any, batch: int, length: int) -> dict[str, float]:
    """Milliseconds of one layer's attention, 12 heads of 64: ours, varlen_attn, flex_attention, padded SDPA."""
    from torch.nn.functional import scaled_dot_product_attention

    sdpa: Any = scaled_dot_product_attention
    lengths = lengths_of("uniform", batch, length)[:batch]
    q, k, v, edges, longest = heads_of(lengths, 12, 64)
    padded = torch.randn(3, batch, 12, longest, 64, device=DEVICE, dtype=DTYPE)
    seen = (torch.arange(longest, device=DEVICE)[None] < torch.tensor(lengths, device=DEVICE)[:, None])[:, None, None]
    seen = seen.expand(-1, -1, longest, -1)
    repeats = 10

    def again(call: Call) -> Call:
        return graphed(lambda: [call() for _ in range(repeats)])

    calls = {
        "triton": again(lambda: varlen_attention(q, k, v, edges, longest, backend="triton")),
        "varlen_attn": again(lambda: varlen_attention(q, k, v, edges, longest, backend="torch")),
        "padded SDPA with mask": again(lambda: sdpa(*padded, attn_mask=seen)),
    }
    if flex is not None:
        mask = same_sequence(lengths)
        row = [part.transpose(0, 1)[None].contiguous() for part in (q, k, v)]
        calls["flex_attention"] = again(lambda: flex(*row, block_mask=mask))
    return {name: value / repeats for name, value in interleaved(calls).items()}


def same_sequence(lengths: list[int]) -> Any:
    """flex_attention's mask: who stands in the same sequence."""
    from torch.nn.attention.flex_attention import create_block_mask

    owner = torch.repeat_interleave(torch.arange(len(lengths), device=DEVICE), torch.tensor(lengths, device=DEVICE))

    def same(b: Any, h: Any, i: Any, j: Any) -> Any:
        return owner[i] == owner[j]

    return create_block_mask(same, None, None, len(owner), len(owner), device=str(DEVICE))


def flex_compiled() -> Any:
    """flex_attention, compiled for all sizes at once."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def attention_table() -> dict[str, dict[str, float]]:
    """By size; flex_attention is left out where it cannot do it."""
    found: dict[str, dict[str, float]] = {}
    flex: Any = flex_compiled()
    for length in (128, 512, 1024, 2048):
        for batch in (16, 64):
            name = f"batch {batch}, S {length}"
            try:
                found[name] = attention_alone(flex, batch, length)
            except Exception as error:
                told(name, "flex_attention failed and is left out from here on:", str(error)[:300])
                flex = None
                found[name] = attention_alone(flex, batch, length)
            told("attention", name, found[name])
    return found


def summary(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Packed over each of the others, by case."""
    ratios = {}
    for name, ms in found.items():
        attention = ms.get("attention, torch", ms.get("attention, reference", 0.0))
        ratios[name] = {
            "of the floor": ms["packed"] / (ms["linears"] + attention),
            "padded over packed": ms["padded"] / ms["packed"],
            "padded and compiled over packed": ms["padded, compiled"] / ms["packed"],
            "sorted and compiled over packed": ms["sorted, compiled"] / ms["packed"],
        }
    return ratios


with (
    torch.inference_mode(),
    Evidence(
        "bytetransformer-gpu",
        claim="A packed encoder takes at most 1.25x of its floor at batch 64, 1.5x at 16, and beats sorting by length",
        paper="Zhai et al. (2023), ByteTransformer",
        folder=ARGUMENTS.results or (Path(gettempdir()) if ARGUMENTS.small else None),
    ) as evidence,
):
    found: dict[str, dict[str, float]] = {}
    left_out: list[str] = []
    alone: dict[str, dict[str, float]] = {}
    batches, swept = ((16, 64), (128, 512, 256, 1024, 2048)) if GPU else ((4,), (32,))
    for shape in SHAPES:
        model = model_of(shape)
        compiled = torch.compile(model, dynamic=True)
        ways = {
            "padded": model,
            "padded, compiled": compiled,
            "sorted": model,
            "sorted, compiled": compiled,
            "packed": pack(model, compile=True, graphs=True),
        }
        cases = [("uniform", batch, length) for length in swept for batch in batches]
        if (RESULTS / "bytetransformer.json").is_file():
            cases[4:4] = [("docstrings", batch, 512) for batch in batches]
        for kind, batch, length in cases:
            name = f"{shape}, batch {batch}, S {length}, {kind}"
            if time.perf_counter() - START > ARGUMENTS.seconds:
                left_out.append(name)
                continue
            try:
                found[name] = case(ways, model, kind, batch, length)
            except torch.OutOfMemoryError as error:
                left_out.append(f"{name}: {error}"[:80])
                continue
            told(name, {key: round(value, 3) for key, value in found[name].items()})
        if GPU and not alone:
            alone = attention_table()
    ratios = summary(found)
    for name, ratio in ratios.items():
        told(name, {key: round(value, 2) for key, value in ratio.items()})
    evidence.baseline = {name: {k: value for k, value in ms.items() if k != "packed"} for name, ms in found.items()}
    evidence.result = {"packed": {name: ms["packed"] for name, ms in found.items()}, "ratios": ratios}
    evidence.result |= {"attention of one layer": alone, "left out": left_out}
    for batch, most in ((64, "<= 1.25"), (16, "<= 1.5")):
        mine = {name: ratio for name, ratio in ratios.items() if f"batch {batch}," in name}
        if mine:
            worst = max(mine, key=lambda name: mine[name]["of the floor"])
            evidence.check(f"Packed over its floor, batch {batch}, worst ({worst})", mine[worst]["of the floor"], most)
    worst = min(ratios, key=lambda name: ratios[name]["sorted and compiled over packed"])
    evidence.check(
        f"Sorted and compiled over packed, worst ({worst})", ratios[worst]["sorted and compiled over packed"], ">= 0.97"
    )
    for shape in SHAPES:
        name = f"{shape}, batch 64, S 512, uniform"
        if name in ratios:
            evidence.check(f"Padded over packed, {name}", ratios[name]["padded over packed"], ">= 1.8")
    largest = max(ms["packed: difference"] / max(ms["padded, compiled: difference"], 1e-9) for ms in found.values())
    evidence.check(
        "Packed's difference from padded, over that of compiling alone, worst", largest, "<= 2.0" if GPU else ">= 0"
    )
    if alone:
        asked = [ms for name, ms in alone.items() if name in ("batch 16, S 512", "batch 16, S 1024")]
        if asked:
            gain = min(ms["padded SDPA with mask"] / ms["triton"] for ms in asked)
            evidence.check("Padded SDPA with mask over our kernel, batch 16, S 512 and 1024", gain, ">= 2")
        evidence.check(
            "varlen_attn over our kernel, worst", min(ms["varlen_attn"] / ms["triton"] for ms in alone.values()), ">= 1"
        )
    if not evidence.holds:
        evidence.cause = (
            "the floor leaves out what moves as many bytes as the linears: GELU, norms and residual sums; at short "
            "sequences a call also waits once for the lengths, and one kernel after another takes its time to start"
        )
