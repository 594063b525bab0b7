"""Text decoders: GPT-2 and LLaMA and their relatives. All are causal and (but for OPT-350m) pre-norm."""

from dataclasses import replace

from leanformers.anatomy.family import AttentionPaths, Family, FeedForwardPaths, NormPath, StackPaths

_LLAMA_ATTENTION = AttentionPaths(
    module="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
)
_LLAMA_STACK = StackPaths(
    name="decoder",
    layers="layers",
    num_layers=("num_hidden_layers",),
    attention=(_LLAMA_ATTENTION,),
    feed_forward=(FeedForwardPaths(module="mlp", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),),
    norms=(
        NormPath(path="input_layernorm", place="pre", reads="attention"),
        NormPath(path="post_attention_layernorm", place="pre", reads="feed_forward"),
    ),
    final_norm="norm",
    causal=True,
)
_NORMED_HEADS = replace(_LLAMA_ATTENTION, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
_HEADS = ("lm_head", "score")

DECODERS: tuple[Family, ...] = (
    Family(
        name="gpt2",
        model_types=("gpt2",),
        stacks=(
            StackPaths(
                name="decoder",
                layers="h",
                num_layers=("n_layer",),
                attention=(AttentionPaths(module="attn", fused="attn.c_attn", output="attn.c_proj"),),
                feed_forward=(FeedForwardPaths(module="mlp", up="mlp.c_fc", down="mlp.c_proj"),),
                norms=(
                    NormPath(path="ln_1", place="pre", reads="attention"),
                    NormPath(path="ln_2", place="pre", reads="feed_forward"),
                ),
                final_norm="ln_f",
                causal=True,
            ),
        ),
        embeddings=("wte",),
        writes=("wte.weight", "wpe.weight"),
        activation="activation_function",
        pooled=("multiple_choice_head",),
        outputs=_HEADS,
        scores_every_position=True,
    ),
    Family(
        name="gpt-neox",
        model_types=("gpt_neox",),
        stacks=(
            StackPaths(
                name="decoder",
                layers="layers",
                num_layers=("num_hidden_layers",),
                attention=(
                    AttentionPaths(
                        module="attention",
                        fused="attention.query_key_value",
                        layout="per_head",
                        output="attention.dense",
                    ),
                ),
                feed_forward=(FeedForwardPaths(module="mlp", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),),
                norms=(
                    NormPath(path="input_layernorm", place="pre", reads="attention"),
                    NormPath(path="post_attention_layernorm", place="pre", reads="feed_forward"),
                ),
                final_norm="final_layer_norm",
                parallel_if="use_parallel_residual",
                causal=True,
            ),
        ),
        embeddings=("embed_in",),
        writes=("embed_in.weight",),
        outputs=_HEADS,
        scores_every_position=True,
    ),
    Family(
        # OPT-350m norms after each sub-layer, has no final norm and projects narrow embeddings in and out.
        name="opt",
        model_types=("opt",),
        stacks=(
            StackPaths(
                name="decoder",
                layers="decoder.layers",
                num_layers=("num_hidden_layers",),
                attention=(replace(_LLAMA_ATTENTION, output="self_attn.out_proj"),),
                feed_forward=(FeedForwardPaths(module="", up="fc1", down="fc2"),),
                norms=(
                    NormPath(
                        path="self_attn_layer_norm",
                        place="post",
                        reads="attention",
                        pre_if="do_layer_norm_before",
                    ),
                    NormPath(
                        path="final_layer_norm",
                        place="post",
                        reads="feed_forward",
                        pre_if="do_layer_norm_before",
                    ),
                ),
                final_norm="decoder.final_layer_norm",
                causal=True,
            ),
        ),
        embeddings=("decoder.embed_tokens",),
        writes=("decoder.embed_tokens.weight", "decoder.embed_positions.weight"),
        inputs=("decoder.project_in",),
        activation="activation_function",
        outputs=("decoder.project_out", *_HEADS),
        scores_every_position=True,
    ),
    Family(
        name="llama",
        model_types=("llama",),
        stacks=(_LLAMA_STACK,),
        embeddings=("embed_tokens",),
        writes=("embed_tokens.weight",),
        rms_norm=True,
        stock_heads="divides",
        outputs=_HEADS,
        scores_every_position=True,
    ),
    Family(
        name="mistral",
        model_types=("mistral",),
        stacks=(_LLAMA_STACK,),
        embeddings=("embed_tokens",),
        writes=("embed_tokens.weight",),
        rms_norm=True,
        stock_heads="fixed_head_dim",
        outputs=_HEADS,
        scores_every_position=True,
    ),
    Family(
        name="qwen3",
        model_types=("qwen3",),
        stacks=(replace(_LLAMA_STACK, attention=(_NORMED_HEADS,)),),
        embeddings=("embed_tokens",),
        writes=("embed_tokens.weight",),
        rms_norm=True,
        stock_heads="fixed_head_dim",
        outputs=_HEADS,
        scores_every_position=True,
    ),
    Family(
        name="gemma3",
        model_types=("gemma3_text",),
        stacks=(
            replace(
                _LLAMA_STACK,
                attention=(_NORMED_HEADS,),
                norms=(
                    NormPath(path="input_layernorm", place="pre", reads="attention"),
                    NormPath(path="post_attention_layernorm", place="output", reads="attention"),
                    NormPath(path="pre_feedforward_layernorm", place="pre", reads="feed_forward"),
                    NormPath(path="post_feedforward_layernorm", place="output", reads="feed_forward"),
                ),
            ),
        ),
        embeddings=("embed_tokens",),
        writes=("embed_tokens.weight",),
        activation="hidden_activation",
        rms_norm=True,
        norm_offset=True,
        stock_heads="divides",
        outputs=_HEADS,
        scores_every_position=True,
    ),
    Family(
        name="phi3",
        model_types=("phi3",),
        stacks=(
            replace(
                _LLAMA_STACK,
                attention=(AttentionPaths(module="self_attn", fused="self_attn.qkv_proj", output="self_attn.o_proj"),),
                feed_forward=(FeedForwardPaths(module="mlp", fused="mlp.gate_up_proj", down="mlp.down_proj"),),
            ),
        ),
        embeddings=("embed_tokens",),
        writes=("embed_tokens.weight",),
        rms_norm=True,
        stock_heads="fixed_head_dim",
        outputs=_HEADS,
        scores_every_position=True,
    ),
)
