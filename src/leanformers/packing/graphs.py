"""CUDA graphs of packed forward passes: one launch instead of some hundred, where launches are what takes the time.

A graph has fixed shapes and a batch seldom the same twice, so its length, its tokens and its longest sequence are
filled up to the next of some sixteen sizes per doubling. What is filled in belongs to no sequence: attention passes
over it, nothing else mixes tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from leanformers.packing.index import Index

MOST_TOKENS = 32768  # beyond it a GPU is busy for longer than it takes to launch
MOST_GRAPHS = 64  # their memory is shared, but each holds its inputs

Row = dict[str, torch.Tensor]
R = TypeVar("R")


def round_up(count: int, least: int = 64) -> int:
    """The next size at or above `count`: multiples of a sixteenth of the power of two below it."""
    step = max(least, 1 << max(0, count.bit_length() - 5))
    return -(-max(count, 1) // step) * step


class _Replayed(Generic[R]):
    """Graphs by the sizes they were captured for."""

    def __init__(self) -> None:
        self._captured: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Row, R]] = {}
        self._pool: Any = None

    def replay(self, given: Row, lengths: dict[str, int], sizes: tuple[int, ...], run: Callable[[Row], R]) -> R:
        """What `run` returns of inputs like `given`, [batch, length, ...], filled up to `lengths` where named.

        Captured anew for other `sizes`, lengths or dtypes. It is overwritten by the next call.
        """
        with torch.inference_mode(False), torch.no_grad():  # what is held is written to in any mode
            shapes = tuple((name, part.dtype, part.shape[:1], part.shape[2:]) for name, part in given.items())
            key = (sizes, tuple(lengths.items()), shapes)
            if key not in self._captured:
                if len(self._captured) >= MOST_GRAPHS:
                    self._captured.pop(next(iter(self._captured)))
                self._captured[key] = self._capture(_filled(given, lengths), run)
            graph, held, output = self._captured[key]
            for name, part in given.items():
                _copy(part, held[name])
            graph.replay()
            return output

    def _capture(self, held: Row, run: Callable[[Row], R]) -> tuple[torch.cuda.CUDAGraph, Row, R]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles and tunes outside the graph
                run(held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run(held)
        self._pool = graph.pool() if self._pool is None else self._pool
        return graph, held, output


def _filled(given: Row, lengths: dict[str, int]) -> Row:
    held = {}
    for name, part in given.items():
        shape = part.shape if name not in lengths else (part.shape[0], lengths[name], *part.shape[2:])
        held[name] = part.new_zeros(shape)
        _copy(part, held[name])
    return held


def _copy(part: torch.Tensor, held: torch.Tensor) -> None:
    if part.dim() < 2:
        held.copy_(part)
        return
    if part.dtype == torch.bool and part.shape[1] < held.shape[1]:
        held.zero_()  # a mask; other inputs are read only where it is set
    held[:, : part.shape[1]].copy_(part)


class Graphs:
    """Replays `forward(row, cu_seqlens, max_length)` for rows that are packed already."""

    def __init__(self, forward: Callable[[Row, torch.Tensor, int], Any]) -> None:
        self._forward = forward
        self._graphs: _Replayed[Any] = _Replayed()

    def __call__(self, row: Row, cu_seqlens: torch.Tensor, max_length: int) -> Any:
        """What `forward` returns, for at least as many tokens; it is overwritten by the next call."""
        longest = round_up(max_length)
        lengths = {name: round_up(part.shape[1]) for name, part in row.items()}

        def run(held: Row) -> Any:
            return self._forward({name: held[name] for name in row}, held["cu_seqlens"], longest)

        return self._graphs.replay({**row, "cu_seqlens": cu_seqlens}, lengths, (longest, len(cu_seqlens)), run)


class PaddedGraphs:
    """Replays `forward(padded inputs, index)` from the padded batch on: its tokens are found within the graph."""

    def __init__(self, forward: Callable[[Row, Index], Any]) -> None:
        self._forward = forward
        self._graphs: _Replayed[tuple[Index, Any]] = _Replayed()

    def __call__(self, padded: Row, mask: torch.Tensor, lengths: list[int]) -> tuple[Index, Any]:
        """The index, and what `forward` returns for at least as many tokens; both are overwritten by the next call.

        padded: inputs [batch, length, ...]. mask: [batch, length], not 0 where a token is real. lengths: of the rows.
        """
        length, tokens, longest = round_up(mask.shape[1]), round_up(sum(lengths)), round_up(max(lengths))
        given = {**padded, "mask": mask != 0}

        def run(held: Row) -> tuple[Index, Any]:
            index = Index.filled(held["mask"], tokens, longest)
            return index, self._forward({name: held[name] for name in padded}, index)

        index, output = self._graphs.replay(given, dict.fromkeys(given, length), (tokens, longest), run)
        return index.of_tokens(sum(lengths)), output
