"""A small tokenizer of every kind, trained on the spot on real text, and the packaged ones, for all tests."""

from __future__ import annotations

import argparse
import collections
import inspect
import json
import logging
import typing

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    T5Tokenizer,
)

from leanformers.errors import LeanError

CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def paragraphs(*modules) -> list[str]:
    """Real English text from the standard library's docstrings."""
    docs = [inspect.getdoc(value) or "" for module in modules for value in vars(module).values()]
    return [part for text in docs for part in text.split("\n\n") if len(part) > 20]


TEXTS = paragraphs(argparse, collections, typing, inspect, logging, str, dict, list)[:900]
CORPUS, OTHER = (
    TEXTS[::2],
    [*TEXTS[1::2], "naïve café — 東京 ½ 🙂\t\ttabs\n\n\nlines", "Zyx Qwv  123456789", "", "  "],
)


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece({}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special))
    return BertTokenizer(vocab=tokenizer.get_vocab())


def unigram_backend(special):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=1500, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(TEXTS, trainer)
    spec = json.loads(tokenizer.to_str())
    # The Rust reader may miss the last of 17 digits, so a copy would differ from its original.
    spec["model"]["vocab"] = [[piece, round(score, 6)] for piece, score in spec["model"]["vocab"]]
    return Tokenizer.from_str(json.dumps(spec))


def unigram():
    """The unknown token is no special one and stands late, so that its id moves."""
    backend = unigram_backend(["<pad>", "</s>"])
    spec = json.loads(backend.to_str())
    spec["model"]["unk_id"] = 900
    spec["model"]["vocab"].insert(900, ["<unk>", 0.0])
    backend = Tokenizer.from_str(json.dumps(spec))
    ids = [("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def t5():
    pieces = json.loads(unigram_backend(["<pad>", "</s>", "<unk>"]).to_str())["model"]["vocab"]
    sentinels = [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    return T5Tokenizer(vocab=[tuple(piece) for piece in pieces] + sentinels)


def bpe(trainer_options, **options):
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer_options = {
        "vocab_size": 2000,
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
    } | trainer_options
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(**trainer_options))
    return tokenizer


def byte_level():
    """Added tokens behind the vocabulary, a chat template, sequences of processors, words taken whole."""
    spec = json.loads(bpe({"special_tokens": ["<|end|>"]}).to_str())
    spec["model"]["ignore_merges"] = True
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.add_tokens([AddedToken("leanformers", single_word=True, normalized=True)])
    backend.add_special_tokens(["<|user|>", "<|assistant|>", "<|start|>"])
    start = backend.token_to_id("<|start|>")
    template = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", start)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|start|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=CHAT,
        model_max_length=77,
    )


def roberta():
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    model = json.loads(bpe({"special_tokens": special}).to_str())["model"]
    return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


def end_of_word():
    """Marks on the last character of a word, as in CLIP."""
    backend = bpe({"end_of_word_suffix": "</w>", "special_tokens": ["<unk>"]}, end_of_word_suffix="</w>")
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.BPEDecoder(suffix="</w>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")


def byte_fallback():
    """The form of LLaMA 2: merges over characters, bytes for what has none; several merges make one token."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    options = {"vocab_size": 1200, "special_tokens": special, "max_token_length": 12}
    trained.train_from_iterator([text[:200] for text in CORPUS], trainers.BpeTrainer(**options))
    model = json.loads(trained.to_str())["model"]
    vocab, known = model["vocab"], {tuple(pair) for pair in model["merges"]}
    merges = [tuple(pair) for pair in model["merges"]]
    for token in list(vocab)[len(special) :]:
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        merges += [pair for pair in splits if pair not in known and pair[0] in vocab and pair[1] in vocab]
    return LlamaTokenizer(vocab=vocab, merges=merges)


def whole_words():
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["<unk>"], vocab_size=900))
    backend.enable_padding(pad_id=backend.token_to_id("the"), pad_token="the", length=4)
    backend.enable_truncation(9)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def packaged(name):
    from leanformers.tasks.checkpoints import checkpoint

    try:
        return AutoTokenizer.from_pretrained(checkpoint(name))
    except LeanError as error:
        pytest.skip(str(error))


MAKERS = {
    "minilm": lambda: packaged("minilm"),
    "smollm2": lambda: packaged("smollm2"),
    "wordpiece": wordpiece,
    "unigram": unigram,
    "t5": t5,
    "byte-level": byte_level,
    "roberta": roberta,
    "end-of-word": end_of_word,
    "byte-fallback": byte_fallback,
    "whole-words": whole_words,
}
BYTES = {"smollm2", "byte-level", "roberta", "byte-fallback"}
