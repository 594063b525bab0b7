"""Lean models where they are served: `export` writes a model for a runtime, proves the folder and measures it."""

from leanformers.deploy.exporting import Exported, draft, export
from leanformers.deploy.stock import check_stock, obstacles
from leanformers.deploy.targets import DEPLOYED, TARGETS, Target, quantises, target, width_multiple

__all__ = [
    "DEPLOYED",
    "TARGETS",
    "Exported",
    "Target",
    "check_stock",
    "draft",
    "export",
    "obstacles",
    "quantises",
    "target",
    "width_multiple",
]
