"""Counting a corpus, and choosing the vocabulary that covers it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch

from leanformers.errors import LeanError
from leanformers.surgery.tokenizers.backend import Backend
from leanformers.surgery.tokenizers.closure import Closure, indices, spoken

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

BATCH = 256
# Rows that a model's authors left empty: the last choice when a vocabulary is filled up.
UNUSED = re.compile(r"[\[<]\|?(unused|reserved)\D*\d*\|?[\]>]", re.IGNORECASE)


def count(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Tensor:
    """How often each id occurs in texts, which are read as a stream.

    Nothing is truncated and no special token is added. Returns [vocabulary], indexed by old id.
    """
    backend = Backend.of(tokenizer)
    encoder = backend.fresh()
    counts = torch.zeros(backend.size, dtype=torch.long)
    for batch in _batches(texts):
        encodings = encoder.encode_batch_fast(batch, add_special_tokens=False)
        ids = torch.tensor([index for encoding in encodings for index in encoding.ids], dtype=torch.long)
        counts += torch.bincount(ids, minlength=backend.size)
    return counts


def choose(
    counts: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    coverage: float = 0.999,
    size: int | None = None,
    multiple: int = 64,
    forced: Sequence[int] | Tensor = (),
    texts: Iterable[str] = (),
) -> Tensor:
    """The ids to keep: the most frequent ones with all that they need (see close).

    counts: occurrences [vocabulary] of each old id; coverage: share of the occurrences whose ids are kept
    at least; size: number of ids instead of a coverage; multiple: the number kept is rounded up to a multiple
    of this with the next most frequent tokens; forced: ids that stay; texts: labels and prompts whose tokens
    stay.
    Returns sorted old ids [size], all of them where size exceeds the vocabulary.
    LeanError: counts of another tokenizer, an empty corpus, a size that the indispensable tokens exceed.
    """
    backend = Backend.of(tokenizer)
    if len(counts) != backend.size:
        raise LeanError(f"counts has {len(counts)} entries but {backend.name} has {backend.size} ids: count anew")
    if not 0 < coverage <= 1 or multiple < 1:
        raise LeanError(f"coverage={coverage} and multiple={multiple} must be in (0, 1] and at least 1")
    times: list[int] = counts.tolist()
    total = sum(times)
    if size is None and total == 0:
        raise LeanError("the corpus holds no tokens: give texts to count, or a size")
    closure = Closure(backend)
    seen = (index for index in backend.tokens if times[index])
    kept = closure.close({*indices(backend, forced), *spoken(tokenizer, backend, texts)})
    kept |= closure.alphabet(seen)
    unused = {index for index, token in backend.tokens.items() if UNUSED.fullmatch(token)}
    order = sorted(backend.tokens, key=lambda index: (-times[index], index in unused, index))
    if size is None:
        covered = sum(times[index] for index in kept)
        for index in order:
            if covered >= coverage * total:
                break
            new = closure.needs(index) - kept
            covered += sum(times[other] for other in new)
            kept |= new
    target = min(-(-(size or len(kept)) // multiple) * multiple, len(order))
    if len(kept) > target:
        raise LeanError(f"size={size} is below the {len(kept)} ids that must stay: raise it")
    _fill(kept, closure, order, target)
    return torch.tensor(sorted(kept), dtype=torch.long)


def _fill(kept: set[int], closure: Closure, order: list[int], target: int) -> None:
    """Add tokens in order, skipping those that bring more with them than there is room for."""
    before = -1
    while before != len(kept) < target:
        before = len(kept)
        for index in order:
            new = closure.needs(index) - kept
            if len(kept) + len(new) <= target:
                kept |= new
            if len(kept) == target:
                break


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    stream = iter(texts)
    while batch := list(islice(stream, BATCH)):
        yield batch
