"""Modules that an edit can put in place of a model's own.

Every part is built from shapes alone (`Part.like(old, …)`, on any device, meta included) and filled by
`carry(old)`. Its tensors are plain parameters and buffers, so that safetensors holds them and a loader
can fill an empty part by name.
"""

from leanformers.parts.absent import AbsentAttention, AbsentLinear
from leanformers.parts.dense_sparse import DenseSparseLinear
from leanformers.parts.linear import LowRankLinear
from leanformers.parts.masked import MaskedLinear
from leanformers.parts.quantised import QuantisedLinear
from leanformers.parts.quantised_embedding import (
    QuantisedEmbedding,
    TiedQuantisedEmbedding,
    TiedQuantisedHead,
)
from leanformers.parts.token_reducers import TokenReducer
from leanformers.parts.top_k import TopK

__all__ = [
    "AbsentAttention",
    "AbsentLinear",
    "DenseSparseLinear",
    "LowRankLinear",
    "MaskedLinear",
    "QuantisedEmbedding",
    "QuantisedLinear",
    "TiedQuantisedEmbedding",
    "TiedQuantisedHead",
    "TokenReducer",
    "TopK",
]
