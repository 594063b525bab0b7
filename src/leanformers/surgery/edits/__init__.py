"""The edit vocabulary, one file each."""

from leanformers.surgery.edits.drop_layers import DropLayers
from leanformers.surgery.edits.factorise import FactoriseLinear
from leanformers.surgery.edits.keep_heads import KeepHeads
from leanformers.surgery.edits.keep_neurons import KeepNeurons
from leanformers.surgery.edits.keep_vocabulary import KeepVocabulary
from leanformers.surgery.edits.mask import MaskWeights
from leanformers.surgery.edits.quantise import QuantiseLinear
from leanformers.surgery.edits.quantise_embeddings import QuantiseEmbeddings

__all__ = [
    "DropLayers",
    "FactoriseLinear",
    "KeepHeads",
    "KeepNeurons",
    "KeepVocabulary",
    "MaskWeights",
    "QuantiseEmbeddings",
    "QuantiseLinear",
]
