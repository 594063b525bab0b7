"""Decoders exported with their cache write what transformers' own generate writes."""

from __future__ import annotations

import pytest
import torch
from exports import lean

from families import TINY
from leanformers.errors import LeanError
from leanformers.runtimes import available
from leanformers.runtimes.exported import missing
from leanformers.runtimes.generation import export_generation, greedy
from leanformers.runtimes.saved import open_exported, save

pytestmark = pytest.mark.skipif(missing("this", "dynamo") is not None, reason="needs transformers 5.23")
STRUCTURE = ("drop_layers", "keep_heads", "keep_neurons", "factorise_linear", "mask_weights")


class Characters:
    """Stands for a tokenizer: a character is a token."""

    pad_token_id = 0

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [4 + ord(letter) % 60 for letter in text]}

    def save_pretrained(self, folder: str) -> None:
        """It has no files."""


@pytest.mark.parametrize(
    ("family", "form", "runtime"),
    [
        ("llama", "openvino", "openvino"),
        ("llama", "onnx", "onnxruntime"),
        pytest.param("gemma3", "onnx", "onnxruntime", marks=pytest.mark.slow),  # windows that slide
    ],
)
def test_an_exported_decoder_writes_the_same_tokens(family, form, runtime, tmp_path):
    if runtime not in available():
        pytest.skip(f"needs leanformers[{form}]")
    model, _ = lean(family, kinds=STRUCTURE, head="lm")
    exported = open_exported(save(export_generation(model, Characters(), form), tmp_path / "out", None, Characters()))
    assert list(exported.components) == ["model"] and exported.generation_config is not None
    ids = torch.randint(4, 96, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :4] = mask[1, :4] = 0  # padded on the left
    for rows, length in ((3, 9), (1, 4)):  # another call begins with an empty cache
        given = {"input_ids": ids[:rows, :length], "attention_mask": mask[:rows, :length]}
        written = model.generate(**given, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None)
        assert torch.equal(greedy(exported, **given, new_tokens=8), written[:, length:])


def test_what_does_not_write_is_refused():
    for family, head in (("bert", "lm"), ("t5", "lm"), ("llama", "classification")):
        with pytest.raises(LeanError, match="is no decoder that writes by itself: export it with its task"):
            export_generation(TINY[family](head=head), Characters(), "onnx")
    with pytest.raises(LeanError, match="not exported to 'dynamo'; choose one of onnx, openvino"):
        export_generation(TINY["llama"](head="lm"), Characters(), "dynamo")
