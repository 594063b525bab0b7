"""Models exported with their cache write what transformers' own generate writes."""

from __future__ import annotations

import pytest
import torch
from lean_models import lean

from families import TINY, inputs
from leanformers.errors import LeanError
from leanformers.runtimes import available
from leanformers.runtimes.encoder_decoder import write
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


@pytest.mark.skipif("onnxruntime" not in available(), reason="needs leanformers[onnx]")
def test_an_exported_decoder_whose_windows_slide_writes_the_same_tokens(tmp_path):
    """Other decoders: tests/deploy."""
    model, _ = lean("gemma3", kinds=STRUCTURE, head="lm")
    assert {"sliding_attention", "full_attention"} == set(model.config.layer_types)
    exported = open_exported(save(export_generation(model, Characters(), "onnx"), tmp_path / "out", None, Characters()))
    assert list(exported.components) == ["model"] and exported.generation_config is not None
    ids = torch.randint(4, 96, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :4] = mask[1, :4] = 0  # padded on the left
    for rows, length in ((3, 9), (1, 4)):  # another call begins with an empty cache
        given = {"input_ids": ids[:rows, :length], "attention_mask": mask[:rows, :length]}
        written = model.generate(**given, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None)
        assert torch.equal(greedy(exported, **given, new_tokens=8), written[:, length:])


@pytest.mark.parametrize(
    ("family", "form"),
    [("t5", "onnx"), ("bart", "openvino"), ("whisper", "onnx"), ("whisper", "openvino")],  # masked and not, in both
)
def test_an_exported_encoder_decoder_writes_the_same_tokens(family, form, tmp_path):
    if {"onnx": "onnxruntime"}.get(form, form) not in available():
        pytest.skip(f"needs leanformers[{form}]")
    model, made = lean(family, kinds=STRUCTURE, head="lm")
    assert len(made) >= 4
    exported = open_exported(save(export_generation(model, Characters(), form), tmp_path / "out"))
    assert set(exported.components) == {"encoder", "decoder"} and exported.generation_config is not None
    if form == "onnx":  # no weights are stored twice but those of the table that both embed with
        stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.data")) / 4
        held = sum(tensor.numel() for tensor in model.state_dict().values())
        assert stored < 1.15 * held + model.get_input_embeddings().weight.numel()
    for rows, length in ((3, 9), (1, 4)):
        given = inputs(model, rows, length, padded=family != "whisper")
        del given["decoder_input_ids"]
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "eos_token_id": None, "forced_eos_token_id": None}
        wanted = model.generate(**given, **options, do_sample=False)[:, -8:]
        found = greedy(exported, **given, new_tokens=8) if family != "whisper" else write(exported, given, 8)
        assert torch.equal(found, wanted)


def test_what_does_not_write_is_refused():
    for family, head in (("bert", "lm"), ("t5", "classification"), ("llama", "classification")):
        with pytest.raises(LeanError, match="is no model that writes by itself: export it with its task"):
            export_generation(TINY[family](head=head), Characters(), "onnx")
    with pytest.raises(LeanError, match="not exported to 'dynamo'; choose one of onnx, openvino"):
        export_generation(TINY["llama"](head="lm"), Characters(), "dynamo")
