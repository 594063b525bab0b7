"""Text encoders: BERT and its relatives. All are post-norm."""

from leanformers.anatomy.family import AttentionPaths, Family, FeedForwardPaths, NormPath, StackPaths


def _bert_stack(
    attention: AttentionPaths,
    *,
    attention_norm: str = "attention.output.LayerNorm",
    more_norms: tuple[str, ...] = (),
) -> StackPaths:
    return StackPaths(
        name="encoder",
        layers="encoder.layer",
        num_layers=("num_hidden_layers",),
        attention=(attention,),
        feed_forward=(FeedForwardPaths(module="", up="intermediate.dense", down="output.dense"),),
        norms=(
            NormPath(path=attention_norm, place="post", reads="attention"),
            NormPath(path="output.LayerNorm", place="post", reads="feed_forward"),
        ),
        embedding_norms=("embeddings.LayerNorm", *more_norms),
    )


_BERT_ATTENTION = AttentionPaths(
    module="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
)
_WORDS = ("embeddings.word_embeddings",)
_TABLES = (
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight",
)

ENCODERS: tuple[Family, ...] = (
    Family(
        name="bert",
        model_types=("bert",),
        stacks=(_bert_stack(_BERT_ATTENTION),),
        embeddings=_WORDS,
        summary_tokens=1,
        writes=_TABLES,
        pooled=("pooler", "cls.seq_relationship"),
        outputs=("pooler.dense", "cls.predictions.transform.dense"),
    ),
    Family(
        name="roberta",
        model_types=("roberta", "xlm-roberta", "camembert"),
        stacks=(_bert_stack(_BERT_ATTENTION),),
        embeddings=_WORDS,
        summary_tokens=1,
        writes=_TABLES,
        positions_follow_padding=True,
        outputs=("pooler.dense", "lm_head.dense", "classifier.dense"),
    ),
    Family(
        name="distilbert",
        model_types=("distilbert",),
        stacks=(
            StackPaths(
                name="encoder",
                layers="transformer.layer",
                num_layers=("n_layers",),
                attention=(
                    AttentionPaths(
                        module="attention",
                        query="attention.q_lin",
                        key="attention.k_lin",
                        value="attention.v_lin",
                        output="attention.out_lin",
                    ),
                ),
                feed_forward=(FeedForwardPaths(module="ffn", up="ffn.lin1", down="ffn.lin2"),),
                norms=(
                    NormPath(path="sa_layer_norm", place="post", reads="attention"),
                    NormPath(path="output_layer_norm", place="post", reads="feed_forward"),
                ),
                embedding_norms=("embeddings.LayerNorm",),
            ),
        ),
        embeddings=_WORDS,
        summary_tokens=1,
        writes=("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"),
        activation="activation",
        outputs=("vocab_transform", "pre_classifier"),
    ),
    Family(
        # Its tables are narrower than the stream and norm before the projection, which alone writes to it.
        name="electra",
        model_types=("electra",),
        stacks=(_bert_stack(_BERT_ATTENTION),),
        embeddings=_WORDS,
        summary_tokens=1,
        writes=_TABLES,
        inputs=("embeddings_project",),
        outputs=("generator_predictions.dense", "discriminator_predictions.dense", "classifier.dense"),
    ),
    Family(
        name="mpnet",
        model_types=("mpnet",),
        stacks=(
            _bert_stack(
                AttentionPaths(
                    module="attention.attn",
                    query="attention.attn.q",
                    key="attention.attn.k",
                    value="attention.attn.v",
                    output="attention.attn.o",
                ),
                attention_norm="attention.LayerNorm",
            ),
        ),
        embeddings=_WORDS,
        summary_tokens=1,
        writes=("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"),
        shared_position_bias=True,
        positions_follow_padding=True,
        outputs=("pooler.dense", "lm_head.dense", "classifier.dense"),
    ),
    Family(
        # The table of relative positions is no part of the stream, but what reads the stream reads it too.
        name="deberta-v2",
        model_types=("deberta-v2",),
        stacks=(
            _bert_stack(
                AttentionPaths(
                    module="attention.self",
                    query="attention.self.query_proj",
                    key="attention.self.key_proj",
                    value="attention.self.value_proj",
                    output="attention.output.dense",
                    extra=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
                    positions="encoder.rel_embeddings",
                    position_terms="pos_att_type",
                ),
                more_norms=("encoder.LayerNorm",),
            ),
        ),
        embeddings=_WORDS,
        summary_tokens=1,
        writes=(*_TABLES, "encoder.rel_embeddings.weight"),
        inputs=("embeddings.embed_proj",),
        outputs=("pooler.dense", "cls.predictions.transform.dense", "lm_predictions.lm_head.dense"),
        fixed_width=("encoder.conv",),
    ),
)
