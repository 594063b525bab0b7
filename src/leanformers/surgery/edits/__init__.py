"""The edit vocabulary, one file each."""

from leanformers.surgery.edits.drop_layers import DropLayers
from leanformers.surgery.edits.drop_sublayers import DropSublayers
from leanformers.surgery.edits.factorise import FactoriseLinear
from leanformers.surgery.edits.keep_heads import KeepHeads
from leanformers.surgery.edits.keep_neurons import KeepNeurons
from leanformers.surgery.edits.keep_vocabulary import KeepVocabulary
from leanformers.surgery.edits.mask import MaskWeights
from leanformers.surgery.edits.prune_prompt import PrunePrompt
from leanformers.surgery.edits.quantise import QuantiseLinear
from leanformers.surgery.edits.quantise_embeddings import QuantiseEmbeddings
from leanformers.surgery.edits.reduce_tokens import ReduceTokens
from leanformers.surgery.edits.slice_residual import SliceResidual
from leanformers.surgery.edits.swap_attention import SwapAttention

__all__ = [
    "DropLayers",
    "DropSublayers",
    "FactoriseLinear",
    "KeepHeads",
    "KeepNeurons",
    "KeepVocabulary",
    "MaskWeights",
    "PrunePrompt",
    "QuantiseEmbeddings",
    "QuantiseLinear",
    "ReduceTokens",
    "SliceResidual",
    "SwapAttention",
]
