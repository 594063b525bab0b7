"""Which tokens a vocabulary cannot do without: the closure that makes a set of kept ids legal.

- Every tokenizer: special and added tokens, sentinels, unknown, padding, the ids in the post-processor's
  template, the bytes of byte-level and byte-fallback vocabularies, printable ASCII.
- BPE: the whole derivation of a token. Merges nest, and those inside a token happen in the order in which
  they happen when its string stands alone; so the derivation is what encoding that string does, and it is
  unique even where several merges make the same token.
- WordPiece and Unigram: the characters of a token, so that a word that lost its piece is spelled and does
  not become unknown.
- Unigram: the piece with the lowest score. An unknown character costs that score less ten; were it dropped,
  an unknown could become cheaper than a dropped character was, and win over the full tokenizer's path.
"""

from __future__ import annotations

import logging
import re
import string
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from leanformers.errors import LeanError
from leanformers.surgery.tokenizers.backend import Backend, template_ids

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SENTINEL = re.compile(r"▁?<extra_id_\d+>")
WORD_START = "▁"
logger = logging.getLogger(__name__)


class Closure:
    """What each token of a tokenizer needs.

    required: ids without which the tokenizer is broken; base: these and the characters that every text uses.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.required = _required(backend)
        self.base = self.required | _spelling(backend, string.printable + WORD_START)
        merges = backend.model["merges"] if backend.kind == "BPE" else ()
        self._ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
        self._products = [merged(backend, left, right) for left, right in merges]
        self._needs: dict[int, set[int]] = {}

    def needs(self, index: int) -> set[int]:
        """The ids that a kept id brings with it, itself included."""
        if index not in self._needs:
            if index in self.backend.added:
                self._needs[index] = {index}
            elif self.backend.kind == "BPE":
                self._needs[index] = self.derivation(index)
            else:
                self._needs[index] = {index} | self.alphabet([index])
        return self._needs[index]

    def alphabet(self, seen: Iterable[int]) -> set[int]:
        """The single-character rows that spell these ids; none where bytes or a BPE's derivations do it."""
        if self.backend.kind not in ("WordPiece", "Unigram") or self.backend.model.get("byte_fallback"):
            return set()
        text = "".join(self.backend.tokens[index] for index in seen if index not in self.backend.added)
        return _spelling(self.backend, text)

    def derivation(self, index: int) -> set[int]:
        """The ids that occur while BPE merges the token's string; the id alone if that ends elsewhere."""
        token, ids = self.backend.rows[index], self.backend.ids
        symbols = self._symbols(token)
        seen = set(symbols)
        never = len(self._products)
        while len(symbols) > 1:
            ranks = [self._ranks.get(pair, never) for pair in pairwise(symbols)]
            best = min(ranks)
            if best == never:
                return {index}
            at = ranks.index(best)
            symbols[at : at + 2] = [self._products[best]]
            seen.add(self._products[best])
        if symbols != [token] or not seen <= ids.keys():
            return {index}
        return {ids[symbol] for symbol in seen}

    def _symbols(self, token: str) -> list[str]:
        """The characters from which BPE starts, marked as parts or ends of a word where the model does so."""
        prefix, suffix = _marks(self.backend)
        inside = bool(prefix) and token.startswith(prefix)
        ends = bool(suffix) and token.endswith(suffix)
        body = token[len(prefix) if inside else 0 : len(token) - (len(suffix) if ends else 0)]
        symbols = [prefix + character if inside or at else character for at, character in enumerate(body)]
        if symbols and ends:
            symbols[-1] += suffix
        return symbols

    def close(self, keep: Iterable[int]) -> set[int]:
        """The ids, everything that they need, and the base."""
        return self.base.union(*(self.needs(index) for index in set(keep)))

    def missing(self, keep: set[int]) -> set[int]:
        """What these ids lack to be legal: required ids, and derivations of BPE."""
        needed = self.required - keep
        if self.backend.kind == "BPE":
            needed = needed.union(*(self.needs(index) for index in keep))
        return needed - keep


def close(tokenizer: PreTrainedTokenizerBase, keep: Tensor | Sequence[int], texts: Iterable[str] = ()) -> Tensor:
    """Add to the kept old ids everything that makes them a legal vocabulary.

    texts: label words, prompts and the like, whose tokens must stay; the chat template's own always do.
    Returns the sorted ids [size]. LeanError: a tokenizer that cannot be cut, an id that is no token.
    """
    import torch

    backend = Backend.of(tokenizer)
    closed = Closure(backend).close({*indices(backend, keep), *spoken(tokenizer, backend, texts)})
    return torch.tensor(sorted(closed), dtype=torch.long)


def indices(backend: Backend, keep: Tensor | Sequence[int]) -> list[int]:
    """The ids as Python integers. LeanError: an id that is no token."""
    ids = [int(index) for index in keep]
    for index in ids:
        if index not in backend.tokens:
            raise LeanError(
                f"keep holds {index}, which is no token of {backend.name}: its ids lie below {backend.size} "
                "(padded embedding rows are not tokens)"
            )
    return ids


def spoken(tokenizer: PreTrainedTokenizerBase, backend: Backend, texts: Iterable[str]) -> set[int]:
    """The ids of texts, at the start of a line and after a space, and of the chat template's own words."""
    phrases = [*texts]
    if getattr(tokenizer, "chat_template", None):
        phrases += _chat(tokenizer)
    phrases += [f" {text}" for text in phrases]
    encodings = backend.fresh().encode_batch(phrases, add_special_tokens=False)
    return {index for encoding in encodings for index in encoding.ids}


def _chat(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    turns = [{"role": role, "content": "."} for role in ("user", "assistant", "user")]
    try:
        return [str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))]
    except Exception as error:  # a template is a program and may raise anything
        logger.warning("the chat template of %s could not be rendered: %s", type(tokenizer).__name__, error)
        return []


def merged(backend: Backend, left: str, right: str) -> str:
    """The token that a BPE merge makes."""
    prefix, _ = _marks(backend)
    return left + (right[len(prefix) :] if prefix else right)


def _marks(backend: Backend) -> tuple[str, str]:
    """What marks a token as the continuation and as the end of a word; empty where nothing does."""
    return backend.model.get("continuing_subword_prefix") or "", backend.model.get("end_of_word_suffix") or ""


def _required(backend: Backend) -> set[int]:
    from tokenizers.pre_tokenizers import ByteLevel

    needed = set(backend.named) | set(backend.added) | {place[at] for place, at in template_ids(backend.spec)}
    needed |= {index for index, token in backend.rows.items() if SENTINEL.fullmatch(token)}
    if backend.spec["padding"] is not None:
        needed.add(backend.spec["padding"]["pad_id"])
    if backend.kind == "Unigram":
        scores = [score for _, score in backend.model["vocab"]]
        needed.add(min(range(len(scores)), key=lambda index: scores[index]))
        needed |= {backend.model["unk_id"]} - {None}
    elif backend.model.get("unk_token") in backend.ids:
        needed.add(backend.ids[backend.model["unk_token"]])
    if backend.model.get("byte_fallback"):
        needed |= {backend.ids[name] for byte in range(256) if (name := f"<0x{byte:02X}>") in backend.ids}
    if backend.byte_level:
        needed |= _spelling(backend, "".join(ByteLevel.alphabet()))
    return needed & backend.tokens.keys()


def _spelling(backend: Backend, text: str) -> set[int]:
    """The rows that spell a text character by character, wherever in a word the characters stand."""
    prefix, suffix = _marks(backend)
    forms = {before + c + after for c in set(text) for before in ("", prefix) for after in ("", suffix)}
    return {backend.ids[form] for form in forms & backend.ids.keys()}
