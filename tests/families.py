"""A tiny random model of every family that the anatomy knows, for all tests.

``FAMILIES_TINY[name]()`` makes the family's model with its most usual head (a language-model head for
decoders and encoder-decoders, classification for encoders, CTC for wav2vec2); ``VARIANTS_TINY`` holds the
other dresses that an entry covers (gated or not, another norm placement, another model type); ``TINY`` both.
They take ``head="lm"``, ``"classification"`` or ``"base"`` for another head, ``seed``, and config fields.
Weights are large enough, and biases and gains varied enough, for a mistake to show in the outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as T

from leanformers.anatomy import Family
from leanformers.anatomy.families import find

VOCAB = 96
_SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = dict(_SMALL, vocab_size=VOCAB, max_position_embeddings=64)
_GROUPED = dict(_TEXT, num_key_value_heads=2)
_BART = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCAB,
}
_T5 = {
    "d_model": 32,
    "d_kv": 6,
    "num_heads": 4,
    "d_ff": 64,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "vocab_size": VOCAB,
    "decoder_start_token_id": 0,
}
_IMAGE = dict(_SMALL, image_size=32, patch_size=8)
_DEBERTA = dict(
    _TEXT,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    position_buckets=8,
    norm_rel_ebd="layer_norm",
    position_biased_input=False,
    share_att_key=True,
    type_vocab_size=0,
)
_CONVOLUTIONS = {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
_OPT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}


@dataclass(frozen=True)
class Tiny:
    """Makes one tiny model. ``heads`` are endings of Auto classes or class names, the usual head first."""

    config: str
    settings: dict[str, Any]
    heads: dict[str, str] = field(default_factory=dict)

    def __call__(self, *, seed: int = 0, head: str | None = None, **fields: Any) -> Any:
        settings = {**self.settings, **fields}
        config = getattr(T, f"{self.config}Config")(**settings, num_labels=3)
        name = "" if head == "base" else self.heads[head or next(iter(self.heads))]
        torch.manual_seed(seed)
        if name and not name.startswith("For"):  # several classes of one kind: no Auto class knows which
            return vary(getattr(T, name)(config), seed).eval()
        model = getattr(T, f"AutoModel{name}").from_config(config)
        return vary(model, seed).eval()


@torch.no_grad()
def vary(model: Any, seed: int) -> Any:
    """Draw every parameter anew: matrices at about unit gain, biases and norm gains away from 0 and 1."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if parameter.ndim > 1 and "embed" not in name and "token" not in name:
            noise *= 1.2 / math.sqrt(parameter[0].numel())
        elif parameter.ndim > 1:
            noise *= 0.5
        elif name.endswith("bias"):
            noise *= 0.2
        else:  # gains: LayerScale's and the norms' lie around 1, Gemma's are offsets around 0
            noise = 0.2 * noise + (0 if "gemma" in type(model).__name__.lower() else 1)
        parameter.copy_(noise)
    return model


_ENCODER = {"classification": "ForSequenceClassification", "lm": "ForMaskedLM"}
_DECODER = {"lm": "ForCausalLM", "classification": "ForSequenceClassification"}
_SEQ2SEQ = {"lm": "ForSeq2SeqLM", "classification": "ForSequenceClassification"}

FAMILIES_TINY: dict[str, Tiny] = {
    "bert": Tiny("Bert", _TEXT, _ENCODER),
    "roberta": Tiny("Roberta", _TEXT, _ENCODER),
    "distilbert": Tiny(
        "DistilBert",
        {
            "dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 64,
            "vocab_size": VOCAB,
            "max_position_embeddings": 64,
        },
        _ENCODER,
    ),
    "electra": Tiny("Electra", dict(_TEXT, embedding_size=16), _ENCODER),
    "mpnet": Tiny("MPNet", _TEXT, _ENCODER),
    "deberta-v2": Tiny("DebertaV2", _DEBERTA, _ENCODER),
    "gpt2": Tiny(
        "GPT2",
        {
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "vocab_size": VOCAB,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        _DECODER,
    ),
    "gpt-neox": Tiny("GPTNeoX", dict(_TEXT, pad_token_id=0), _DECODER),
    "opt": Tiny("OPT", _OPT, _DECODER),
    "llama": Tiny("Llama", dict(_GROUPED, pad_token_id=0), _DECODER),
    "mistral": Tiny("Mistral", dict(_GROUPED, pad_token_id=0, sliding_window=None), _DECODER),
    "qwen3": Tiny("Qwen3", dict(_GROUPED, head_dim=12, pad_token_id=0), _DECODER),
    "gemma3": Tiny(
        "Gemma3Text",
        dict(
            _GROUPED,
            head_dim=12,
            query_pre_attn_scalar=12,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        {"lm": "ForCausalLM", "classification": "ForSequenceClassification"},
    ),
    "phi3": Tiny("Phi3", dict(_GROUPED, pad_token_id=0, bos_token_id=1, eos_token_id=2), _DECODER),
    "t5": Tiny("T5", dict(_T5, feed_forward_proj="gated-gelu"), _SEQ2SEQ),
    "bart": Tiny("Bart", dict(_BART, max_position_embeddings=64), _SEQ2SEQ),
    "whisper": Tiny(
        "Whisper",
        dict(
            _BART,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
            begin_suppress_tokens=None,
        ),
        {"lm": "ForSpeechSeq2Seq", "classification": "ForAudioClassification"},
    ),
    "vit": Tiny("ViT", _IMAGE, {"classification": "ForImageClassification"}),
    "deit": Tiny("DeiT", _IMAGE, {"classification": "DeiTForImageClassification"}),
    "dinov2": Tiny(
        "Dinov2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "mlp_ratio": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        {"classification": "ForImageClassification"},
    ),
    "audio-spectrogram-transformer": Tiny(
        "AST",
        dict(_SMALL, patch_size=8, frequency_stride=8, time_stride=8, num_mel_bins=16, max_length=48),
        {"classification": "ForAudioClassification"},
    ),
    "wav2vec2": Tiny(
        "Wav2Vec2",
        dict(_SMALL, **_CONVOLUTIONS, vocab_size=20),
        {"ctc": "ForCTC", "classification": "ForAudioClassification"},
    ),
}

VARIANTS_TINY: dict[str, Tiny] = {
    "xlm-roberta": Tiny("XLMRoberta", _TEXT, _ENCODER),
    "camembert": Tiny("Camembert", _TEXT, _ENCODER),
    "mt5": Tiny("MT5", dict(_T5, feed_forward_proj="gated-gelu"), _SEQ2SEQ),
    "t5-relu": Tiny("T5", dict(_T5, feed_forward_proj="relu"), _SEQ2SEQ),
    "deberta-v2-separate": Tiny("DebertaV2", dict(_DEBERTA, share_att_key=False), _ENCODER),
    "deberta-v2-absolute": Tiny(
        "DebertaV2", dict(_TEXT, relative_attention=False, pos_att_type=[], embedding_size=16), _ENCODER
    ),
    "opt-post-norm": Tiny("OPT", dict(_OPT, do_layer_norm_before=False, word_embed_proj_dim=16), _DECODER),
    "gpt-neox-sequential": Tiny("GPTNeoX", dict(_TEXT, pad_token_id=0, use_parallel_residual=False), _DECODER),
    "llama-ungrouped": Tiny("Llama", dict(_TEXT, pad_token_id=0, attention_bias=True, mlp_bias=True), _DECODER),
    "dinov2-swiglu": Tiny(
        "Dinov2",
        dict(FAMILIES_TINY["dinov2"].settings, use_swiglu_ffn=True),
        {"classification": "ForImageClassification"},
    ),
    "wav2vec2-stable": Tiny(
        "Wav2Vec2",
        dict(_SMALL, **_CONVOLUTIONS, vocab_size=20, do_stable_layer_norm=True, feat_extract_norm="layer"),
        {"ctc": "ForCTC", "classification": "ForAudioClassification"},
    ),
}

TINY: dict[str, Tiny] = {**FAMILIES_TINY, **VARIANTS_TINY}
PERCEPTION = (
    "whisper",
    "vit",
    "deit",
    "dinov2",
    "dinov2-swiglu",
    "audio-spectrogram-transformer",
    "wav2vec2",
    "wav2vec2-stable",
)
TEXT = tuple(name for name in TINY if name not in PERCEPTION)
ENCODER_DECODERS = ("t5", "t5-relu", "mt5", "bart", "whisper")


def family(name: str) -> Family:
    """The anatomy's entry for one of the tiny models, without building it."""
    entry = find(getattr(T, f"{TINY[name].config}Config").model_type)
    assert entry is not None
    return entry


def inputs(model: Any, batch: int = 2, length: int = 7, seed: int = 1, *, padded: bool = False) -> dict[str, Any]:
    """Random inputs for any of the models.

    For text ``length`` counts tokens (of source and target alike); images, spectrograms and Whisper's
    features have the size that the model wants; wav2vec2 gets a wave of ``length`` frames. ``padded`` pads
    every sequence but the first on the right, with an attention mask; a model without one gets full inputs.
    """
    random = torch.Generator().manual_seed(seed)
    config, name = model.config, model.config.model_type

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    if name in ("vit", "deit", "dinov2"):
        return {"pixel_values": normal(batch, config.num_channels, config.image_size, config.image_size)}
    if name == "audio-spectrogram-transformer":
        return {"input_values": normal(batch, config.max_length, config.num_mel_bins)}
    if name == "wav2vec2":
        wave = {"input_values": normal(batch, 10 * length + 15)}  # strides 5 x 2
        if padded:
            wave["attention_mask"] = _mask(batch, 10 * length + 15, 20)
        return wave
    ids = torch.randint(4, config.vocab_size, (batch, length), generator=random)
    if name == "whisper":
        features = normal(batch, config.num_mel_bins, 2 * config.max_source_positions)
        whisper = {"input_features": features}
        return whisper if not hasattr(model.base_model, "decoder") else {**whisper, "decoder_input_ids": ids}
    batch_inputs = {"input_ids": ids}
    if padded:
        mask = _mask(batch, length, max(length // 3, 1))
        batch_inputs["attention_mask"] = mask
        batch_inputs["input_ids"] = ids.masked_fill(mask == 0, config.pad_token_id or 0)
    if config.is_encoder_decoder and "Classification" not in type(model).__name__:
        batch_inputs["decoder_input_ids"] = torch.randint(4, config.vocab_size, (batch, length), generator=random)
    if config.is_encoder_decoder and "Classification" in type(model).__name__:
        eos = torch.full((batch, 1), config.eos_token_id)
        batch_inputs["input_ids"] = torch.cat([batch_inputs["input_ids"][:, :-1], eos], dim=1)
    return batch_inputs


def _mask(batch: int, length: int, short: int) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1:, length - short :] = 0
    return mask


def set_attention(model: Any, name: str) -> None:
    """Choose the attention function everywhere; before transformers 5.23, T5's stacks are not told of it."""
    model.set_attn_implementation(name)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = name


def outputs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The model's main output (logits, or the last hidden state of a base model), without gradients."""
    with torch.no_grad():
        result = model(**batch)
    return result.logits if hasattr(result, "logits") and result.logits is not None else result[0]
