"""A tokenizer read as `tokenizer.json`, with everything refused that this form cannot express."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from leanformers.errors import LeanError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")
# Their ids are bytes or code points, so there is nothing to drop.
BYTE_TOKENIZERS = ("ByT5Tokenizer", "CanineTokenizer", "MyT5Tokenizer", "PerceiverTokenizer")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The state of a fast tokenizer.

    spec: `tokenizer.json` as a dictionary; kind: its model's type, one of KINDS; name: the class, for
    messages; named: the ids that the Python class names (pad, eos, mask, …).
    """

    name: str
    kind: str
    spec: dict[str, Any] = field(repr=False)
    named: frozenset[int] = frozenset()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Backend:
        """Read a tokenizer. LeanError: not fast, made of bytes, or not expressible as `tokenizer.json`."""
        if tokenizer is None:
            raise LeanError("the model has no tokenizer: load it from a folder or a name that holds one")
        name = type(tokenizer).__name__
        if name.removesuffix("Fast") in BYTE_TOKENIZERS:
            raise LeanError(f"{name} reads bytes or characters: it has no vocabulary to cut, leave this step out")
        if not getattr(tokenizer, "is_fast", False):
            raise LeanError(
                f"{name} is not a fast tokenizer: convert it to tokenizer.json first, "
                "for example by loading it with AutoTokenizer and sentencepiece installed"
            )
        try:
            spec = json.loads(tokenizer.backend_tokenizer.to_str())
        except Exception as error:  # tokenizers raises bare Exception for custom Python components
            raise LeanError(
                f"{name} cannot be written as tokenizer.json ({error}): replace its custom Python components"
            ) from error
        kind = spec["model"].get("type")
        if kind not in KINDS:
            raise LeanError(f"{name} holds a {kind} model, which cannot be cut: only these can, {', '.join(KINDS)}")
        if kind == "WordLevel" and spec["model"].get("unk_token") not in spec["model"]["vocab"]:
            raise LeanError(f"{name} knows whole words only: give it an unknown token before cutting it")
        return cls(name=name, kind=kind, spec=spec, named=frozenset(tokenizer.all_special_ids))

    @property
    def model(self) -> dict[str, Any]:
        return self.spec["model"]

    @cached_property
    def rows(self) -> dict[int, str]:
        """id -> string of the model's own vocabulary, without the tokens added on top."""
        if self.kind == "Unigram":
            return {index: piece for index, (piece, _) in enumerate(self.model["vocab"])}
        return {index: token for token, index in self.model["vocab"].items()}

    @cached_property
    def added(self) -> dict[int, str]:
        """id -> string of the added tokens; most of them are rows of the model too."""
        return {token["id"]: token["content"] for token in self.spec["added_tokens"]}

    @cached_property
    def tokens(self) -> dict[int, str]:
        """id -> string of everything."""
        return self.rows | self.added

    @cached_property
    def ids(self) -> dict[str, int]:
        """string -> id of the model's own vocabulary (the first row of a string that occurs twice)."""
        return {token: index for index, token in sorted(self.rows.items(), reverse=True)}

    @property
    def size(self) -> int:
        """One more than the highest id: the length of a vector indexed by ids."""
        return max(self.tokens) + 1

    @cached_property
    def byte_level(self) -> bool:
        """Whether text is written in the 256 characters that stand for bytes."""
        parts = (self.spec[room] for room in ("normalizer", "pre_tokenizer", "decoder"))
        return any(part["type"] == "ByteLevel" for room in parts for part in components(room))

    def fresh(self) -> Tokenizer:
        """A `tokenizers.Tokenizer` of its own that neither pads nor truncates."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(json.dumps(self.spec | {"truncation": None, "padding": None}))


def components(spec: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The leaves of a normaliser, pre-tokeniser, post-processor or decoder, sequences opened."""
    if spec is None:
        return
    if spec["type"] != "Sequence":
        yield spec
        return
    for name in ("normalizers", "pretokenizers", "processors", "decoders"):
        for part in spec.get(name, ()):
            yield from components(part)


def template_ids(spec: dict[str, Any]) -> Iterator[tuple[list[Any], int]]:
    """Every place in the post-processor that holds an id, as (list, index in it), to be read or rewritten."""
    for part in components(spec["post_processor"]):
        if part["type"] == "TemplateProcessing":
            for token in part["special_tokens"].values():
                yield from ((token["ids"], index) for index in range(len(token["ids"])))
        elif part["type"] in ("BertProcessing", "RobertaProcessing"):
            yield from ((part[name], 1) for name in ("sep", "cls"))
