"""What the anatomy needs to be told about a family: module paths and a few facts, nothing that runs.

Paths of a stack's parts are relative to one layer; every other path is relative to the base model
(``BertModel``, not ``BertForSequenceClassification``). Where a part may stand in several places (gated or
not, another release of transformers) an entry lists alternatives; the first whose modules all exist is taken.
Adding a family is adding one entry and one line to the test matrix.
"""

from dataclasses import dataclass
from typing import Literal

Sublayer = Literal["attention", "cross_attention", "feed_forward"]


@dataclass(frozen=True, kw_only=True)
class AttentionPaths:
    """Where one attention lives in a layer.

    ``module`` is the module that holds the head counts. Either ``query``/``key``/``value`` name three
    linears, or ``fused`` names one that computes all three: ``concatenated`` stacks the query rows, then
    the key rows, then the value rows; ``per_head`` stacks query, key and value rows head by head.
    ``query_norm`` and ``key_norm`` norm each head after the projection. ``extra`` are further linears whose
    output rows are laid out by head. ``positions`` is a table, relative to the base model, whose rows every
    layer projects and scores against its queries and keys (DeBERTa): through ``extra`` where the layer has
    them, else through ``query`` and ``key``; ``position_terms`` is the config field that lists the scores.
    """

    module: str
    output: str
    query: str | None = None
    key: str | None = None
    value: str | None = None
    fused: str | None = None
    layout: Literal["concatenated", "per_head"] = "concatenated"
    query_norm: str | None = None
    key_norm: str | None = None
    extra: tuple[str, ...] = ()
    positions: str | None = None
    position_terms: str | None = None


@dataclass(frozen=True, kw_only=True)
class FeedForwardPaths:
    """Where the feed-forward lives in a layer; ``fused`` holds the gate rows, then the up rows.

    ``activation`` names the function where the code fixes it; else the family's config field does.
    """

    module: str
    down: str
    up: str | None = None
    gate: str | None = None
    fused: str | None = None
    activation: str | None = None


@dataclass(frozen=True, kw_only=True)
class NormPath:
    """One norm of a layer.

    ``place`` is ``pre`` (before the sub-layer, off the residual stream), ``post`` (on the stream, after the
    addition), ``output`` (on the sub-layer's output, before the addition) or ``scale`` (there too, but only
    a learned gain). With ``pre_if`` the place is ``pre`` where that config field is true.
    """

    path: str
    place: Literal["pre", "post", "output", "scale"]
    reads: Sublayer
    pre_if: str | None = None


@dataclass(frozen=True, kw_only=True)
class StackPaths:
    """A stack of like layers, encoder or decoder.

    ``num_layers`` are the config fields that count the layers. ``embedding_norms`` come before the first
    layer, ``final_norm`` after the last; with ``final_norm_if`` only where that config field is true, else it
    is an embedding norm too. With ``parallel_if`` true in the config, attention and feed-forward read the
    same stream and are added together.
    """

    name: Literal["encoder", "decoder"]
    layers: str
    num_layers: tuple[str, ...]
    attention: tuple[AttentionPaths, ...]
    feed_forward: tuple[FeedForwardPaths, ...]
    cross_attention: AttentionPaths | None = None
    norms: tuple[NormPath, ...] = ()
    embedding_norms: tuple[str, ...] = ()
    final_norm: str | None = None
    final_norm_if: str | None = None
    parallel_if: str | None = None
    causal: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family's entry.

    ``model_types`` are the ``config.model_type`` values that it covers. ``embeddings`` is the token table
    (the first of the alternatives that exists), None for models that read no tokens; ``activation`` the
    config field that names the feed-forward's function.

    The ends of the residual stream: ``writes`` are parameters that are added to it along their last axis
    (embedding tables, class tokens), ``inputs`` linears and convolutions that write it along their first
    (biases too), ``outputs`` linears outside the layers that read it, in the base model or around it (of
    poolers, language-model and sequence-classification heads). An entry may name what only some models have,
    or have in another width; that is then passed over.

    ``rms_norm``: the norms are RMSNorms, so that rotations of the stream commute with them;
    ``norm_offset``: they multiply by ``1 + weight`` (Gemma) instead of ``weight``.

    ``shared_position_bias``: one position bias of all heads serves every layer (T5, MPNet), so heads cannot
    be dropped layer by layer. ``stock_heads``: what stock transformers can hold when the same number of heads
    goes from every layer: ``fixed_head_dim`` (any number that is left), ``divides`` (one that divides
    hidden_size) or ``never`` (the config has no head size of its own, fewer heads would be larger ones).
    ``positions_follow_padding``: position ids count up from the padding id.

    ``fixed_width``: modules, in the base model or around it, that work on the stream in its full width beside the
    readers and writers, so that it cannot be made narrower with them.

    ``summary_tokens``: tokens at the front (class, distillation) that a pooler or a classifier reads; 0 where there are
    none.

    ``pooled``: modules that see one position of a sequence, in the base model or around it.
    ``scores_every_position``: a sequence classifier is applied to every position (decoders).
    """

    name: str
    model_types: tuple[str, ...]
    stacks: tuple[StackPaths, ...]
    embeddings: tuple[str, ...] | None
    writes: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    activation: str = "hidden_act"
    rms_norm: bool = False
    norm_offset: bool = False
    shared_position_bias: bool = False
    stock_heads: Literal["fixed_head_dim", "divides", "never"] = "never"
    positions_follow_padding: bool = False
    fixed_width: tuple[str, ...] = ()
    pooled: tuple[str, ...] = ("pooler",)
    scores_every_position: bool = False
    summary_tokens: int = 0
