"""Zero-TPrune's choice of tokens on a GPU, from queries and keys: which are copies, which are voted for, what stays.

Wang, Dedhia, Jha (CVPR 2024, arXiv 2305.17328). Written out in float32, the attention probabilities that vote cost more
traffic than a small model's layers. Here they stay on the chip, or in half precision in its caches while they vote
more than once, and each step is one launch whose shapes the schedule fixes, so that a CUDA graph can hold it. The plain
reference is the rule itself, `leanformers.parts.page_rank.PageRank`, which is used wherever the kernels are not: on a
CPU, beyond `MOST` tokens, for an export. No gradient passes a choice, so there is none here.
"""

from __future__ import annotations

import torch

from leanformers.kernels.processors import runs_triton

MOST = 256  # tokens: a row of probabilities is held whole
WIDEST = 128  # of a head
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def fits(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the kernels can choose; query: [batch, heads, length, head_dim], key: [batch, key heads, …]."""
    if query.device.type != "cuda" or query.dtype not in _DTYPES or key.dtype != query.dtype:
        return False
    if query.shape[2] > MOST or query.shape[3] > WIDEST or query.stride(3) != 1 or key.stride(3) != 1:
        return False
    return runs_triton(query.device) and not torch.compiler.is_exporting()


def ranks(scores: torch.Tensor) -> bool:
    """Whether `top` can pick from scores [batch, length]."""
    right = scores.device.type == "cuda" and scores.dtype == torch.float32 and scores.shape[1] <= MOST
    return right and runs_triton(scores.device) and not torch.compiler.is_exporting()


def votes(
    query: torch.Tensor, key: torch.Tensor, alive: torch.Tensor | None, *,
    rounds: int, specials: int, scaling: float, favoured: bool,
) -> torch.Tensor:  # fmt: skip
    """Weighted PageRank of each head among the tokens in ``alive`` (bool [batch, length], None: all).

    rounds: of votes. favoured: the first ``specials`` tokens begin with the root of the length times the votes of
    others.

    Returns:
        float32 [batch, heads, length], each head's sum 1; 0 where a token is not alive.
    """
    run = _votes_op if torch.compiler.is_compiling() else _votes
    return run(query, key, alive, rounds, specials, scaling, favoured)


def copies(
    found: torch.Tensor, key: torch.Tensor, real: torch.Tensor | None, *,
    drop: int, specials: int, variance: tuple[float, float] | None, keep_last: bool,
) -> torch.Tensor:  # fmt: skip
    """The real tokens without ``drop`` of the less important half that are most like one of the other: bool [batch,
    length]. found: `votes`, by which importance goes. Of equal ones the first go."""
    low, high = variance or (0.0, -1.0)
    run = _copies_op if torch.compiler.is_compiling() else _copies
    return run(found, key, real, drop, specials, low, high, keep_last)


def joined(
    found: torch.Tensor, alive: torch.Tensor | None, real: torch.Tensor | None, *,
    variance: tuple[float, float] | None, keep_last: bool,
) -> torch.Tensor:  # fmt: skip
    """Scores of tokens, float32 [batch, length], from `votes` by head: -inf where not alive."""
    low, high = variance or (0.0, -1.0)
    run = _joined_op if torch.compiler.is_compiling() else _joined
    return run(found, alive, real, low, high, keep_last)


def top(scores: torch.Tensor, size: int, specials: int, counts: torch.Tensor | None = None) -> torch.Tensor:
    """The places of the largest scores [batch, length], ascending, int64 [batch, size].

    The first ``specials`` always stay; of equal scores the first come first. counts: int64 [batch], where a text keeps
    fewer than ``size``; what is left over holds ``length``.
    """
    run = _top_op if torch.compiler.is_compiling() else _top
    return run(scores, size, specials, counts)


# -- launches, and the same as operations, so that shapes that a graph leaves open reach the kernels as numbers --------


def _votes(
    query: torch.Tensor, key: torch.Tensor, alive: torch.Tensor | None, rounds: int, specials: int, scaling: float,
    favoured: bool,
) -> torch.Tensor:  # fmt: skip
    from leanformers.kernels import token_votes_triton as kernels

    with torch.cuda.device_of(query):
        return kernels.votes(query, key, alive, rounds, specials, scaling, favoured)


def _copies(
    found: torch.Tensor, key: torch.Tensor, real: torch.Tensor | None, drop: int, specials: int, low: float,
    high: float, keep_last: bool,
) -> torch.Tensor:  # fmt: skip
    from leanformers.kernels import token_votes_triton as kernels

    with torch.cuda.device_of(key):
        return kernels.copies(found, key, real, drop, specials, (low, high), keep_last)


def _joined(
    found: torch.Tensor, alive: torch.Tensor | None, real: torch.Tensor | None, low: float, high: float,
    keep_last: bool,
) -> torch.Tensor:  # fmt: skip
    from leanformers.kernels import token_votes_triton as kernels

    with torch.cuda.device_of(found):
        return kernels.joined(found, alive, real, (low, high), keep_last)


def _top(scores: torch.Tensor, size: int, specials: int, counts: torch.Tensor | None) -> torch.Tensor:
    from leanformers.kernels import token_votes_triton as kernels

    with torch.cuda.device_of(scores):
        return kernels.top(scores.contiguous(), size, specials, counts)


_votes_op = torch.library.custom_op("leanformers::token_votes", _votes, mutates_args=())
_copies_op = torch.library.custom_op("leanformers::token_copies", _copies, mutates_args=())
_joined_op = torch.library.custom_op("leanformers::token_scores", _joined, mutates_args=())
_top_op = torch.library.custom_op("leanformers::token_top", _top, mutates_args=())


@_votes_op.register_fake
def _(query, key, alive, rounds, specials, scaling, favoured):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape[:3], dtype=torch.float32)


@_copies_op.register_fake
def _(found, key, real, drop, specials, low, high, keep_last):  # type: ignore[no-untyped-def]
    return found.new_empty((found.shape[0], found.shape[2]), dtype=torch.bool)


@_joined_op.register_fake
def _(found, alive, real, low, high, keep_last):  # type: ignore[no-untyped-def]
    return found.new_empty((found.shape[0], found.shape[2]))


@_top_op.register_fake
def _(scores, size, specials, counts):  # type: ignore[no-untyped-def]
    return scores.new_empty((scores.shape[0], size), dtype=torch.int64)
