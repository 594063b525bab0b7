"""CUDA graphs of packed forward passes: one launch instead of some hundred, where launches are what takes the time.

A graph has fixed shapes and a batch seldom the same twice, so its tokens are filled up to the next of 32 sizes per
doubling, its length and its longest sequence to the next of eight. What is filled in belongs to no sequence: attention
passes over it, nothing else mixes tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch

from leanformers.packing.index import Index

MOST_TOKENS = 32768  # beyond it a GPU is busy for longer than it takes to launch
MOST_GRAPHS = 64  # their memory is shared, but each holds its inputs and its output
GLANCES = 1000  # at a count that takes a GPU some microseconds, before waiting for it otherwise

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
    held[:, : part.shape[1]].copy_(part, non_blocking=True)  # further on nothing is read


def _mark(mask: torch.Tensor, held: torch.Tensor) -> None:
    """Hold where a mask [batch, at most length] is not 0."""
    width = mask.shape[1]
    if width < held.shape[1]:
        held[:, width:].zero_()
    if mask.device == held.device:
        torch.ne(mask, 0, out=held[:, :width])
    else:
        held[:, :width].copy_(mask != 0, non_blocking=True)


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
    number of tokens: it begins with the count, and the GPU goes on while the answer travels and the pass is launched.
    """

    def __init__(self, pack: Callable[[Row, Index], Row], forward: Callable[[Row, Index], Any]) -> None:
        self._pack, self._forward = pack, forward
        self._packings: _Replays[tuple[Row, Index]] = _Replays()
        self._passes: _Replays[Any] = _Replays()
        self._answer: _Answer | None = None

    def __call__(self, padded: Row, mask: torch.Tensor) -> tuple[Index, Any] | None:
        """The index, and what `forward` returns for at least as many tokens; both are overwritten by the next call.

        padded: inputs [batch, length, ...]. mask: [batch, length], not 0 where a token is real; where it is on the CPU
        nothing is waited for. None where there is no token, or where there are too many for a graph.
        """
        first = next(iter(padded.values()))
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(first):
            if self._answer is None and first.is_cuda:
                self._answer = _Answer()
            batch, length = len(mask), round_up(mask.shape[1], 8)
            most = min(batch * length, MOST_TOKENS)

            def pack(held: Row) -> tuple[Row, Index]:
                counted = None if self._answer is None else self._answer.place()
                index = Index.filled(held["mask"], most, length, counted)
                return self._pack({name: held[name] for name in padded}, index), index

            def hold() -> Row:
                here = {name: part.to(first.device) for name, part in padded.items()}
                real = torch.zeros(batch, length, dtype=torch.bool, device=first.device)
                _mark(mask, real)
                return {"mask": real, **_held(here, dict.fromkeys(padded, length))}

            packing, held = self._packings.of((length, batch, _shapes(padded)), hold, pack, on_gpu=first.is_cuda)
            _mark(mask, held["mask"])
            for name, part in padded.items():
                _copy(part, held[name])
            tokens, longest = self._packed(packing, mask)
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

    def _packed(self, packing: Replay[tuple[Row, Index]], mask: torch.Tensor) -> tuple[int, int]:
        """Pack; how many tokens there are, and how many in the longest row."""
        if self._answer is not None and mask.is_cuda and packing.output[1].ranks is not None:
            return self._answer.of(packing)
        if self._answer is not None:
            self._answer.awaited = True  # and not waited for
        _, index = packing()
        if mask.is_cuda:
            edges = index.cu_seqlens.tolist()
            lengths = [end - start for start, end in pairwise(edges)]
        else:
            lengths = Index.lengths(mask)
        return sum(lengths), max(lengths, default=0)


class _Answer:
    """Where a GPU writes how many tokens it found, in the host's memory, the moment that it knows."""

    def __init__(self) -> None:
        self._counted = torch.full((1,), -1, dtype=torch.int64, pin_memory=True)
        self._begun = torch.cuda.Event()
        self.awaited = False  # something may still write there

    def place(self) -> torch.Tensor:
        """To be written to by what is launched from now on."""
        self.awaited = True
        return self._counted

    def of(self, packing: Callable[[], Any]) -> tuple[int, int]:
        """Pack, and wait for the count alone: how many tokens, and how many in the longest row."""
        from leanformers.kernels.places_triton import numbers

        if self.awaited:
            torch.cuda.current_stream().synchronize()
        self._counted.fill_(-1)
        self.awaited = True
        self._begun.record()
        packing()
        self._begun.synchronize()  # what the GPU had to do before; other threads run meanwhile
        counted = -1
        for _ in range(GLANCES):
            counted = int(self._counted.item())
            if counted >= 0:
                break
        else:  # an error, or a GPU that others use as well
            torch.cuda.current_stream().synchronize()
            counted = int(self._counted.item())
        self.awaited = False
        return numbers(counted)
