"""Quantise the token embeddings to int8 rows, by torchao; a head tied to them reads the same rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.parts.quantised_embedding import (
    QuantisedEmbedding,
    TiedQuantisedEmbedding,
    TiedQuantisedHead,
)
from leanformers.surgery.edit import Cost, Edit, edit, on_meta
from leanformers.surgery.tying import tied_names, untie


@edit("quantise_embeddings")
@dataclass(frozen=True, kw_only=True)
class QuantiseEmbeddings(Edit):
    """Store the token embedding table in int8, one scale per row; only the rows looked up are dequantised."""

    def _table(self, anatomy: Anatomy) -> nn.Embedding:
        table = anatomy.embeddings
        if not isinstance(table, nn.Embedding):
            what = "reads no tokens" if table is None else f"holds its embeddings in a {type(table).__name__}"
            raise LeanError(f"{type(anatomy.model).__name__} {what}: there is no float table to quantise.")
        return table

    def apply(self, anatomy: Anatomy, **tensors: object) -> None:
        table = self._table(anatomy)
        model, head = anatomy.model, anatomy.head
        names = dict(model.named_modules(remove_duplicate=False))
        tied = tied_names(model)
        source = next(name for name, module in names.items() if module is table)
        new = QuantisedEmbedding.like(table)
        if not on_meta(table):
            new.carry(table)
        for name, module in names.items():
            other = module.weight if isinstance(module, (nn.Embedding, nn.Linear)) else None
            if other is None or (other is not table.weight and f"{name}.weight" not in tied):
                continue
            part: nn.Module
            if module is table:
                part = new
            elif module is head and isinstance(module, nn.Linear):
                part = TiedQuantisedHead.like(module, new)
                part.bias = module.bias  # BERT's decoder and its parent share it
            elif isinstance(module, nn.Embedding):
                factor = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
                part = TiedQuantisedEmbedding(new, factor)
            else:
                continue
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent) if parent else model, leaf, part)
        untie(model, source)  # nothing is tied by weights any more: the parts hold one tensor between them

    def cost(self, anatomy: Anatomy) -> Cost:
        self._table(anatomy)
        return Cost()
