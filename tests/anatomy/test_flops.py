"""FLOPs by the map's formula are those that torch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from families import ENCODER_DECODERS, PERCEPTION, TEXT, TINY, inputs, set_attention
from leanformers.anatomy import Anatomy, Rows, linear_flops
from leanformers.errors import LeanError

LENGTH = 9
RELATIVE = ("deberta-v2", "deberta-v2-separate")


@torch.no_grad()
def counted(model: Any, batch: dict[str, torch.Tensor], *modules: str) -> int:
    """torch's count of a forward pass under eager attention: of all, or of the modules named.

    Making rotary tables, a product in some releases of transformers, is left out.
    """
    set_attention(model, "eager")
    with FlopCounterMode(display=False) as counter:
        model(**batch)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    if modules:
        return sum(counts[f"{type(model).__name__}.{module}"] for module in modules)
    return counts["Global"] - sum(flops for name, flops in counts.items() if name.endswith("rotary_emb"))


@pytest.mark.parametrize(("name", "head"), [(name, head) for name in TEXT for head in (*TINY[name].heads, "base")])
def test_text(name: str, head: str) -> None:
    model = TINY[name](head=head)
    assert Anatomy.of(model).flops(LENGTH) == counted(model, inputs(model, 1, LENGTH))


@pytest.mark.parametrize("name", [name for name in TEXT if name not in RELATIVE])
def test_batch(name: str) -> None:
    """All is per sequence (DeBERTa's table, projected once per batch, is counted every time)."""
    model = TINY[name]()
    assert Anatomy.of(model).flops(LENGTH, batch=3) == counted(model, inputs(model, 3, LENGTH))


@pytest.mark.parametrize("name", PERCEPTION)
def test_layers_of_images_and_sound(name: str) -> None:
    model = TINY[name]()
    anatomy, batch = Anatomy.of(model), inputs(model, 1, LENGTH)
    lengths: list[int] = []
    hook = anatomy.layers[0].module.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    layers = [f"{anatomy.prefix}{layer.path}" for layer in anatomy.layers]
    total = counted(model, batch, *layers)
    hook.remove()
    if name in ENCODER_DECODERS:
        assert anatomy.layer_flops(LENGTH, source_length=lengths[0]) == total
    else:
        assert anatomy.layer_flops(lengths[0]) == total


def test_source_and_target_of_other_lengths() -> None:
    model = TINY["t5"]()
    batch = inputs(model, 1, 5)
    batch["decoder_input_ids"] = inputs(model, 1, 11)["decoder_input_ids"]
    assert Anatomy.of(model).flops(11, source_length=5) == counted(model, batch)


@pytest.mark.parametrize(
    ("name", "tiny"),
    [
        ("BertForTokenClassification", "bert"),
        ("BertForQuestionAnswering", "bert"),
        ("BertForNextSentencePrediction", "bert"),
        ("BertForPreTraining", "bert"),
        ("ElectraForPreTraining", "electra"),
        ("DistilBertForTokenClassification", "distilbert"),
        ("DebertaV2ForQuestionAnswering", "deberta-v2"),
        ("GPT2ForTokenClassification", "gpt2"),
        ("Qwen3ForQuestionAnswering", "qwen3"),
        ("T5EncoderModel", "t5"),
        ("T5ForTokenClassification", "t5"),
        ("BartForCausalLM", "bart"),  # a decoder alone skips its cross-attention
        ("BartForQuestionAnswering", "bart"),
    ],
)
def test_other_heads(name: str, tiny: str) -> None:
    config = getattr(transformers, f"{TINY[tiny].config}Config")(**TINY[tiny].settings)
    model = getattr(transformers, name)(config).eval()
    batch = inputs(model, 1, LENGTH)
    if name in ("T5EncoderModel", "T5ForTokenClassification", "BartForCausalLM", "BartForQuestionAnswering"):
        batch = {"input_ids": torch.randint(4, 96, (1, LENGTH))}
    assert Anatomy.of(model).flops(LENGTH) == counted(model, batch)


def test_rows() -> None:
    deberta = Anatomy.of(TINY["deberta-v2"]())
    layer = deberta.layers[0].attention
    assert deberta.rows(layer.query.path) == Rows(1, 16) == deberta.rows(layer.key.path)  # a table of 2 x 8 rows
    assert deberta.rows(layer.value.path) == Rows(1, 0)
    separate = Anatomy.of(TINY["deberta-v2-separate"]())
    layer = separate.layers[0].attention
    assert separate.rows(layer.query.path) == Rows(1, 0)
    assert [separate.rows(extra.path) for extra in layer.extra] == [Rows(0, 16)] * 2
    assert Anatomy.of(TINY["bert"]()).rows("pooler.dense") == Rows(0, 1)
    assert Anatomy.of(TINY["electra"]()).rows("embeddings_project") == Rows(1, 0)
    with pytest.raises(LeanError, match="nowhere"):
        deberta.rows("nowhere")


def test_linear_flops() -> None:
    assert linear_flops(torch.nn.Linear(3, 5)) == 30
