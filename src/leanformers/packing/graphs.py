"""CUDA graphs of packed forward passes: one launch instead of some hundred, where launches are what takes the time.

A graph has fixed shapes and a batch seldom the same twice, so its tokens are filled up to the next of 32 sizes per
doubling, its length and its longest sequence to the next of eight. What is filled in belongs to no sequence: attention
passes over it, nothing else mixes tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from leanformers.packing.index import Index

MOST_TOKENS = 32768  # beyond it a GPU is busy for longer than it takes to launch
MOST_GRAPHS = 64  # their memory is shared, but each holds its inputs and its output

Row = dict[str, torch.Tensor]
R = TypeVar("R")


def round_up(count: int, parts: int = 32, least: int = 64) -> int:
    """The next size at or above `count`: multiples of a part of the power of two below it, of 64 at least."""
    step = max(least, (1 << (count.bit_length() - 1)) // parts if count else 0)
    return -(-max(count, 1) // step) * step


class Replay(Generic[R]):
    """A call whose kernels are launched again at once; `output` is overwritten each time.

    It reads the tensors that it read at first. On a CPU it is simply made again.
    """

    def __init__(self, run: Callable[[], R], pool: Any, *, on_gpu: bool) -> None:
        self._run, self._graph = run, None
        if not on_gpu:
            self.output = run()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles and tunes outside the graph
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.output = run()

    def __call__(self) -> R:
        if self._graph is None:
            self.output = self._run()
        else:
            self._graph.replay()
        return self.output


class _Replays(Generic[R]):
    """Those that there are, by what they were captured for; the oldest one makes room."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Replay[R], Row]] = {}
        self._pool: Any = None

    def of(self, key: Any, held: Callable[[], Row], run: Callable[[Row], R], *, on_gpu: bool) -> tuple[Replay[R], Row]:
        """One, and the inputs that it holds: `held` makes them for a new one."""
        found = self._made.get(key)
        if found is None:
            if len(self._made) >= MOST_GRAPHS:
                self._made.pop(next(iter(self._made)))
            if on_gpu and self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            inputs = held()
            found = self._made[key] = Replay(lambda: run(inputs), self._pool, on_gpu=on_gpu), inputs
        return found


def _held(given: Row, lengths: dict[str, int]) -> Row:
    """Copies of inputs [batch, length, ...], filled up to `lengths` where named."""
    held = {}
    for name, part in given.items():
        shape = part.shape if name not in lengths else (part.shape[0], lengths[name], *part.shape[2:])
        held[name] = part.new_zeros(shape)
        _copy(part, held[name])
    return held


def _copy(part: torch.Tensor, held: torch.Tensor) -> None:
    if part.dim() < 2:
        held.copy_(part, non_blocking=True)
        return
    if part.dtype == torch.bool and part.shape[1] < held.shape[1]:
        held.zero_()  # a mask; other inputs are read only where it is set
    held[:, : part.shape[1]].copy_(part, non_blocking=True)


def _shapes(given: Row) -> tuple[Any, ...]:
    return tuple((name, part.dtype, part.shape[:1], part.shape[2:]) for name, part in given.items())


class Graphs:
    """Replays `forward(row, cu_seqlens, max_length)` for rows that are packed already."""

    def __init__(self, forward: Callable[[Row, torch.Tensor, int], Any]) -> None:
        self._forward = forward
        self._replays: _Replays[Any] = _Replays()

    def __call__(self, row: Row, cu_seqlens: torch.Tensor, max_length: int) -> Any:
        """What `forward` returns, for at least as many tokens; it is overwritten by the next call."""
        longest = round_up(max_length, 8)
        lengths = {name: round_up(part.shape[1]) for name, part in row.items()}
        given = {**row, "cu_seqlens": cu_seqlens}
        key = (longest, len(cu_seqlens), tuple(lengths.items()), _shapes(given))

        def run(held: Row) -> Any:
            return self._forward({name: held[name] for name in row}, held["cu_seqlens"], longest)

        with torch.inference_mode(False), torch.no_grad():  # what is held is written to in any mode
            replay, held = self._replays.of(key, lambda: _held(given, lengths), run, on_gpu=cu_seqlens.is_cuda)
            for name, part in given.items():
                _copy(part, held[name])
            return replay()


class PaddedGraphs:
    """Replays the packing of a padded batch, and the forward pass of what was packed.

    How many tokens there are decides which forward pass it is, and a GPU is waited for to learn it. Packing is for any
    number of tokens: the GPU does it while the answer travels and the forward pass is launched.
    """

    def __init__(self, pack: Callable[[Row, Index], Row], forward: Callable[[Row, Index], Any]) -> None:
        self._pack, self._forward = pack, forward
        self._packings: _Replays[tuple[Row, Index]] = _Replays()
        self._passes: _Replays[Any] = _Replays()
        self._counts: dict[int, torch.Tensor] = {}
        self._counted: Any = None

    def __call__(self, padded: Row, mask: torch.Tensor) -> tuple[Index, Any] | None:
        """The index, and what `forward` returns for at least as many tokens; both are overwritten by the next call.

        padded: inputs [batch, length, ...]. mask: [batch, length], not 0 where a token is real; where it is on the CPU
        nothing is waited for. None where there is no token, or where there are too many for a graph.
        """
        first = next(iter(padded.values()))
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(first):
            given = {**padded, "mask": mask != 0}
            lengths = self._ask(given["mask"])
            length = round_up(mask.shape[1], 8)
            most = min(len(mask) * length, MOST_TOKENS)
            key = (length, _shapes(given))

            def pack(held: Row) -> tuple[Row, Index]:
                index = Index.filled(held["mask"], most, length)
                return self._pack({name: held[name] for name in padded}, index), index

            def hold() -> Row:
                here = {name: part.to(first.device) for name, part in given.items()}
                return _held(here, dict.fromkeys(given, length))

            packing, held = self._packings.of(key, hold, pack, on_gpu=first.is_cuda)
            for name, part in given.items():
                _copy(part, held[name])
            packing()
            counted = lengths()
            tokens, longest = sum(counted), max(counted, default=0)
            if not 0 < tokens <= MOST_TOKENS:
                return None
            sizes = min(round_up(tokens), most), min(round_up(longest, 8), length)

            def run(_: Row) -> Any:
                row, index = packing.output
                # A new first axis, lest a compiled pass see a stride that says how much was packed.
                cut = {name: part[0, : sizes[0]][None] for name, part in row.items()}
                return self._forward(cut, dataclasses.replace(index.of_tokens(sizes[0]), max_length=sizes[1]))

            replay, _ = self._passes.of((id(packing), *sizes), dict, run, on_gpu=first.is_cuda)
            output = replay()
            return packing.output[1].of_tokens(tokens), output

    def _ask(self, real: torch.Tensor) -> Callable[[], list[int]]:
        """The lengths of the rows of a mask, later: what is called waits for them."""
        if not real.is_cuda:
            found = Index.lengths(real)
            return lambda: found
        if len(real) not in self._counts:
            self._counts[len(real)] = torch.empty(len(real), dtype=torch.int64, pin_memory=True)
            self._counted = torch.cuda.Event()
        counts = self._counts[len(real)]
        counts.copy_(real.sum(1), non_blocking=True)
        self._counted.record()

        def wait() -> list[int]:
            self._counted.synchronize()
            lengths: list[int] = counts.tolist()
            return lengths

        return wait
