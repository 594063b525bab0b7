"""Encoders of images and sound: ViT and its relatives, wav2vec 2.0."""

from dataclasses import replace

from leanformers.anatomy.family import AttentionPaths, Family, FeedForwardPaths, NormPath, StackPaths

_VIT_ATTENTION = AttentionPaths(
    module="attention",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
)
_VIT_STACK = StackPaths(
    name="encoder",
    layers="layers",
    num_layers=("num_hidden_layers",),
    attention=(_VIT_ATTENTION,),
    feed_forward=(FeedForwardPaths(module="mlp", up="mlp.fc1", down="mlp.fc2"),),
    norms=(
        NormPath(path="layernorm_before", place="pre", reads="attention"),
        NormPath(path="layernorm_after", place="pre", reads="feed_forward"),
    ),
    final_norm="layernorm",
)
_DINOV2_STACK = replace(
    _VIT_STACK,
    layers="encoder.layer",
    attention=(
        _VIT_ATTENTION,
        AttentionPaths(  # transformers before 5.23
            module="attention.attention",
            query="attention.attention.query",
            key="attention.attention.key",
            value="attention.attention.value",
            output="attention.output.dense",
        ),
    ),
    feed_forward=(
        FeedForwardPaths(module="mlp", up="mlp.fc1", down="mlp.fc2"),
        FeedForwardPaths(module="mlp", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", activation="silu"),
        FeedForwardPaths(  # transformers before 5.23
            module="mlp", fused="mlp.weights_in", down="mlp.weights_out", activation="silu"
        ),
    ),
    norms=(
        NormPath(path="norm1", place="pre", reads="attention"),
        NormPath(path="layer_scale1", place="scale", reads="attention"),
        NormPath(path="norm2", place="pre", reads="feed_forward"),
        NormPath(path="layer_scale2", place="scale", reads="feed_forward"),
    ),
)
_PATCHES = ("embeddings.patch_embeddings.projection",)
_TOKENS = ("embeddings.cls_token", "embeddings.mask_token", "embeddings.position_embeddings")
_TWO_TOKENS = (*_TOKENS, "embeddings.distillation_token")

PERCEPTION: tuple[Family, ...] = (
    Family(
        name="vit",
        model_types=("vit",),
        stacks=(_VIT_STACK,),
        embeddings=None,
        writes=_TOKENS,
        inputs=_PATCHES,
        summary_tokens=1,
        stock_heads="fixed_head_dim",
        outputs=("pooler.dense", "classifier"),
    ),
    Family(
        name="deit",
        model_types=("deit",),
        stacks=(_VIT_STACK,),
        embeddings=None,
        writes=_TWO_TOKENS,
        inputs=_PATCHES,
        summary_tokens=2,
        stock_heads="fixed_head_dim",
        outputs=("pooler.dense", "classifier", "cls_classifier", "distillation_classifier"),
    ),
    Family(
        # The config's head_dim is heeded since transformers 5.23.
        name="dinov2",
        model_types=("dinov2",),
        stacks=(_DINOV2_STACK,),
        embeddings=None,
        writes=_TOKENS,
        inputs=_PATCHES,
        summary_tokens=1,
        stock_heads="fixed_head_dim",
        fixed_width=("classifier",),  # reads the class token and the mean of the patches side by side
    ),
    Family(
        name="audio-spectrogram-transformer",
        model_types=("audio-spectrogram-transformer",),
        stacks=(_VIT_STACK,),
        embeddings=None,
        writes=_TWO_TOKENS,
        inputs=_PATCHES,
        summary_tokens=2,
        stock_heads="fixed_head_dim",
        fixed_width=("classifier",),  # norms the mean of two tokens before it reads it
    ),
    Family(
        # A grouped convolution over the stream itself adds the positions, before the first layer.
        name="wav2vec2",
        model_types=("wav2vec2",),
        stacks=(
            StackPaths(
                name="encoder",
                layers="encoder.layers",
                num_layers=("num_hidden_layers",),
                attention=(replace(_VIT_ATTENTION, output="attention.out_proj"),),
                feed_forward=(
                    FeedForwardPaths(
                        module="feed_forward",
                        up="feed_forward.intermediate_dense",
                        down="feed_forward.output_dense",
                    ),
                ),
                norms=(
                    NormPath(
                        path="layer_norm",
                        place="post",
                        reads="attention",
                        pre_if="do_stable_layer_norm",
                    ),
                    NormPath(
                        path="final_layer_norm",
                        place="post",
                        reads="feed_forward",
                        pre_if="do_stable_layer_norm",
                    ),
                ),
                final_norm="encoder.layer_norm",
                final_norm_if="do_stable_layer_norm",
            ),
        ),
        embeddings=None,
        writes=("masked_spec_embed",),
        inputs=("feature_projection.projection",),
        outputs=("lm_head", "projector"),
        fixed_width=("encoder.pos_conv_embed",),
    ),
)
