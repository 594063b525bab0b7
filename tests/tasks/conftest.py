"""Tiny tokenizers and models, made on the spot: no network, no package."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from .tiny import TEXTS, bert_config, build, sentences


@pytest.fixture(scope="session")
def bert_tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=64, **{f"{k}_token": v for k, v in names.items()}
    )


@pytest.fixture(scope="session")
def llama_tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", padding_side="left"
    )


@pytest.fixture(scope="session")
def bert_classifier(bert_tokenizer):
    return build(BertForSequenceClassification, bert_config(bert_tokenizer, num_labels=2))


@pytest.fixture(scope="session")
def bert_regressor(bert_tokenizer):
    return build(BertForSequenceClassification, bert_config(bert_tokenizer, num_labels=1))


@pytest.fixture(scope="session")
def bert_encoder(bert_tokenizer):
    return build(BertModel, bert_config(bert_tokenizer))


@pytest.fixture(scope="session")
def bert_masked(bert_tokenizer):
    return build(BertForMaskedLM, bert_config(bert_tokenizer))


@pytest.fixture(scope="session")
def llama(llama_tokenizer):
    config = LlamaConfig(
        vocab_size=len(llama_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return build(LlamaForCausalLM, config)


@pytest.fixture
def csv(tmp_path):
    """csv(header, rows, name): writes a CSV and returns its path."""

    def write(header, rows, name="data.csv", encoding="utf-8"):
        lines = [",".join(header)] + [",".join(f'"{v}"' if "," in str(v) else str(v) for v in row) for row in rows]
        path = tmp_path / name
        path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
        return path

    return write


@pytest.fixture
def labelled(csv):
    return csv(("text", "label"), sentences(120))
