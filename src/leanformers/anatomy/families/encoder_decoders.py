"""Encoder-decoders: T5, BART, Whisper."""

from typing import Literal

from leanformers.anatomy.family import AttentionPaths, Family, FeedForwardPaths, NormPath, StackPaths


def _t5_stack(name: Literal["encoder", "decoder"], num_layers: str) -> StackPaths:
    decoder = name == "decoder"
    ff = f"layer.{2 if decoder else 1}"  # a decoder's cross-attention stands between
    dense = f"{ff}.DenseReluDense"
    cross = _t5_attention("layer.1.EncDecAttention") if decoder else None
    return StackPaths(
        name=name,
        layers=f"{name}.block",
        num_layers=(num_layers,),
        attention=(_t5_attention("layer.0.SelfAttention"),),
        cross_attention=cross,
        feed_forward=(
            FeedForwardPaths(module=dense, gate=f"{dense}.wi_0", up=f"{dense}.wi_1", down=f"{dense}.wo"),
            FeedForwardPaths(module=dense, up=f"{dense}.wi", down=f"{dense}.wo"),
        ),
        norms=(
            NormPath(path="layer.0.layer_norm", place="pre", reads="attention"),
            *([NormPath(path="layer.1.layer_norm", place="pre", reads="cross_attention")] if decoder else []),
            NormPath(path=f"{ff}.layer_norm", place="pre", reads="feed_forward"),
        ),
        final_norm=f"{name}.final_layer_norm",
        causal=decoder,
    )


def _t5_attention(module: str) -> AttentionPaths:
    return AttentionPaths(
        module=module, query=f"{module}.q", key=f"{module}.k", value=f"{module}.v", output=f"{module}.o"
    )


def _bart_stack(
    name: Literal["encoder", "decoder"],
    *,
    place: Literal["pre", "post"],
    embedding_norm: bool,
    final_norm: bool,
) -> StackPaths:
    decoder = name == "decoder"
    cross = NormPath(path="encoder_attn_layer_norm", place=place, reads="cross_attention")
    return StackPaths(
        name=name,
        layers=f"{name}.layers",
        num_layers=(f"{name}_layers",),
        attention=(_bart_attention("self_attn"),),
        cross_attention=_bart_attention("encoder_attn") if decoder else None,
        feed_forward=(FeedForwardPaths(module="", up="fc1", down="fc2"),),
        norms=(
            NormPath(path="self_attn_layer_norm", place=place, reads="attention"),
            *([cross] if decoder else []),
            NormPath(path="final_layer_norm", place=place, reads="feed_forward"),
        ),
        embedding_norms=(f"{name}.layernorm_embedding",) if embedding_norm else (),
        final_norm=f"{name}.layer_norm" if final_norm else None,
        causal=decoder,
    )


def _bart_attention(module: str) -> AttentionPaths:
    return AttentionPaths(
        module=module,
        query=f"{module}.q_proj",
        key=f"{module}.k_proj",
        value=f"{module}.v_proj",
        output=f"{module}.out_proj",
    )


ENCODER_DECODERS: tuple[Family, ...] = (
    Family(
        name="t5",
        model_types=("t5", "mt5"),
        stacks=(_t5_stack("encoder", "num_layers"), _t5_stack("decoder", "num_decoder_layers")),
        embeddings=("shared",),
        writes=("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        activation="dense_act_fn",
        rms_norm=True,
        shared_position_bias=True,
        stock_heads="fixed_head_dim",
        outputs=("lm_head", "classification_head.dense"),
    ),
    Family(
        name="bart",
        model_types=("bart",),
        stacks=(
            _bart_stack("encoder", place="post", embedding_norm=True, final_norm=False),
            _bart_stack("decoder", place="post", embedding_norm=True, final_norm=False),
        ),
        embeddings=("shared", "decoder.embed_tokens"),
        writes=(
            "shared.weight",
            "encoder.embed_tokens.weight",
            "encoder.embed_positions.weight",
            "decoder.embed_tokens.weight",
            "decoder.embed_positions.weight",
        ),
        activation="activation_function",
        outputs=("lm_head", "classification_head.dense"),
    ),
    Family(
        # The encoder's stream starts as GELU of its second convolution, plus positions.
        name="whisper",
        model_types=("whisper",),
        stacks=(
            _bart_stack("encoder", place="pre", embedding_norm=False, final_norm=True),
            _bart_stack("decoder", place="pre", embedding_norm=False, final_norm=True),
        ),
        embeddings=("decoder.embed_tokens",),
        writes=(
            "encoder.embed_positions.weight",
            "decoder.embed_tokens.weight",
            "decoder.embed_positions.weight",
        ),
        inputs=("encoder.conv2",),
        activation="activation_function",
        outputs=("proj_out", "projector"),
    ),
)
