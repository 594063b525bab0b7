"""Where the parts of a given model are."""

from leanformers.anatomy.anatomy import Anatomy, base_of, count_parameters
from leanformers.anatomy.families import FAMILIES
from leanformers.anatomy.family import Family
from leanformers.anatomy.flops import Rows, linear_flops
from leanformers.anatomy.parts import (
    Attention,
    FeedForward,
    Layer,
    Norm,
    Projection,
    is_conv1d,
    is_dense,
    is_linear,
    linear_shape,
)

__all__ = [
    "FAMILIES",
    "Anatomy",
    "Attention",
    "Family",
    "FeedForward",
    "Layer",
    "Norm",
    "Projection",
    "Rows",
    "base_of",
    "count_parameters",
    "is_conv1d",
    "is_dense",
    "is_linear",
    "linear_flops",
    "linear_shape",
]
