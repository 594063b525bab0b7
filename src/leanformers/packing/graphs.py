"""CUDA graphs of the packed forward pass: one launch instead of some hundred, where launches are what takes the time.

A graph has fixed shapes and a packed row seldom the same twice, so the row is filled up to the next of some sixteen
sizes per doubling. What is filled in belongs to no sequence: attention passes over it, nothing else mixes tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MOST_TOKENS = 32768  # beyond it a GPU is busy for longer than it takes to launch
MOST_GRAPHS = 64  # their memory is shared, but each holds its inputs

Row = dict[str, torch.Tensor]
_Captured = tuple[torch.cuda.CUDAGraph, Row, torch.Tensor, Any]
Forward = Callable[[Row, torch.Tensor, int], Any]


def round_up(count: int, least: int = 64) -> int:
    """The next size at or above `count`: multiples of a sixteenth of the power of two below it."""
    step = max(least, 1 << max(0, count.bit_length() - 5))
    return -(-max(count, 1) // step) * step


class Graphs:
    """Replays `forward(row, cu_seqlens, max_length)` from graphs that are captured when a size first comes."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self._pool: Any = None

    def __call__(self, row: Row, cu_seqlens: torch.Tensor, max_length: int) -> Any:
        """What `forward` returns, for at least as many tokens; it is overwritten by the next call."""
        with torch.inference_mode(False), torch.no_grad():  # what is held is written to in any mode
            return self._replay(row, cu_seqlens, max_length)

    def _replay(self, row: Row, cu_seqlens: torch.Tensor, max_length: int) -> Any:
        tokens = next(iter(row.values())).shape[1]
        size, longest = round_up(tokens), round_up(max_length)
        shapes = tuple((name, part.dtype, part.shape[2:]) for name, part in row.items())
        key = (size, longest, cu_seqlens.shape[0], shapes)
        if key not in self._captured:
            if len(self._captured) >= MOST_GRAPHS:
                self._captured.pop(next(iter(self._captured)))
            self._captured[key] = self._capture(row, cu_seqlens, size, longest)
        graph, held, edges, output = self._captured[key]
        for name, part in row.items():
            held[name][:, :tokens].copy_(part)
        edges.copy_(cu_seqlens)
        graph.replay()
        return output

    def _capture(self, row: Row, cu_seqlens: torch.Tensor, size: int, longest: int) -> _Captured:
        held = {name: part.new_zeros(1, size, *part.shape[2:]) for name, part in row.items()}
        for name, part in row.items():
            held[name][:, : part.shape[1]].copy_(part)
        edges = cu_seqlens.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles and tunes outside the graph
                self._forward(held, edges, longest)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._forward(held, edges, longest)
        self._pool = graph.pool() if self._pool is None else self._pool
        return graph, held, edges, output
