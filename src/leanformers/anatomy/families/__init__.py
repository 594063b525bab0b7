"""The families: one entry each, data only, in files by kind."""

from leanformers.anatomy.families.decoders import DECODERS
from leanformers.anatomy.families.encoder_decoders import ENCODER_DECODERS
from leanformers.anatomy.families.encoders import ENCODERS
from leanformers.anatomy.families.perception import PERCEPTION
from leanformers.anatomy.family import Family

FAMILIES: tuple[Family, ...] = (*ENCODERS, *DECODERS, *ENCODER_DECODERS, *PERCEPTION)


def find(model_type: str) -> Family | None:
    """The entry that covers ``config.model_type``, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


__all__ = ["FAMILIES", "find"]
