"""A tokenizer inside a GGUF file: byte-level BPE, whole or trimmed.

llama.cpp splits text by a rule that the file names, and the rules are compiled into it. So a tokenizer can be
written if its own rule is one of those, which is read from its `tokenizer.json` and not guessed from the
model's name. NFC normalisation is not done by llama.cpp: text that is not in NFC may be split otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leanformers.errors import LeanError
from leanformers.surgery.tokenizers.backend import Backend, components

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The rule (kinds of the pre-tokeniser's parts, and the pattern if it has one) -> llama.cpp's name of it, and
# whether merges are skipped for a word that is a token as it stands.
_RULES = {
    (("ByteLevel",), None): ("gpt-2", False),
    (("Digits", "ByteLevel"), None): ("smollm", False),
    (("Split", "ByteLevel"), rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"): ("llama-bpe", True),
    (("Split", "ByteLevel"), rf"{_WORDS}|\p{{N}}|{_REST}"): ("qwen2", False),
}


def write_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase | None, rows: int) -> None:
    """Describe the tokenizer in an open GGUFWriter; rows: of the embedding table.

    Without a tokenizer the file names none: it reads and writes token ids, and no text.

    Raises:
        LeanError: a tokenizer that llama.cpp has no rule for, or one with more tokens than the table has rows.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    from gguf import TokenType

    backend = Backend.of(tokenizer)
    rule = _rule(backend)
    if backend.size > rows:
        raise LeanError(
            f"{backend.name} has {backend.size} tokens and the model {rows} rows of embeddings: "
            "give the tokenizer that belongs to the model."
        )
    special = {token["id"] for token in backend.spec["added_tokens"] if token["special"]}
    tokens, kinds = [], []
    for index in range(rows):
        if index not in backend.tokens:
            kind = TokenType.UNUSED
        elif index in special:
            kind = TokenType.CONTROL
        else:
            kind = TokenType.USER_DEFINED if index in backend.added else TokenType.NORMAL
        tokens.append(backend.tokens.get(index, f"[unused {index}]"))
        kinds.append(kind)
    writer.add_tokenizer_model("gpt2")  # what llama.cpp calls byte-level BPE
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = backend.model["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    _write_special(writer, tokenizer)
    writer.add_add_space_prefix(False)
    if template := tokenizer.chat_template:
        named = template.items() if isinstance(template, dict) else [("default", template)]
        writer.add_chat_template([{"name": name, "template": text} for name, text in named])


def _write_special(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """The ids with a part to play, and which of them stand around every text."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for index, add in (
        (begin, writer.add_bos_token_id),
        (end, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if index is not None:
            add(index)
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for first in (False, True):
        for last in (False, True):
            if framed == [begin] * first + bare + [end] * last:
                writer.add_add_bos_token(first)
                writer.add_add_eos_token(last)
                return
    raise LeanError(
        f"{type(tokenizer).__name__} puts other tokens around a text than its first and last one, which GGUF cannot "
        "say: choose another runtime, or write the file without a tokenizer."
    )


def _rule(backend: Backend) -> str:
    """llama.cpp's name for the way in which the tokenizer splits text."""
    refusal = LeanError(
        f"{backend.name} ({backend.kind}) is no byte-level BPE of a kind that llama.cpp has a rule for: "
        f"{', '.join(name for name, _ in _RULES.values())}; write the file without a tokenizer (tokenizer=None), "
        "or choose another runtime."
    )
    model = backend.model
    if backend.kind != "BPE" or not backend.byte_level or model.get("dropout"):
        raise refusal
    if model.get("byte_fallback") and not backend.ids.keys() >= _alphabet():  # else no character ever falls back
        raise refusal
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise refusal
    if any(part["type"] != "NFC" for part in components(backend.spec["normalizer"])):
        raise refusal
    parts = list(components(backend.spec["pre_tokenizer"]))
    rule = _RULES.get((tuple(part["type"] for part in parts), _pattern(parts)))
    if rule is None or rule[1] != bool(model.get("ignore_merges")) or not all(map(_plain, parts)):
        raise refusal
    if parts[-1]["use_regex"] == (parts[0]["type"] == "Split"):  # a pattern stands in its place, or it itself splits
        raise refusal
    for token in backend.spec["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise LeanError(
                f"The token {token['content']!r} of {backend.name} takes the spaces beside it along, which GGUF cannot "
                "say: write the file without a tokenizer (tokenizer=None), or choose another runtime."
            )
    return rule[0]


def _alphabet() -> set[str]:
    """The characters that stand for the 256 bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


def _pattern(parts: list[dict[str, Any]]) -> str | None:
    return next((part["pattern"].get("Regex") for part in parts if part["type"] == "Split"), None)


def _plain(part: dict[str, Any]) -> bool:
    """Whether a part of the pre-tokeniser does what its rule in llama.cpp does, and nothing besides."""
    if part["type"] == "Digits":
        return bool(part["individual_digits"])
    if part["type"] == "Split":
        return part["behavior"] == "Isolated" and not part["invert"]
    return not part["add_prefix_space"]
