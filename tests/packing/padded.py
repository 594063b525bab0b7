"""Padded batches of random ids, and what a packed model must say of them."""

from __future__ import annotations

import torch

from leanformers.anatomy import Anatomy
from leanformers.packing import is_packed

EXACT = {"rtol": 0, "atol": 1e-5}
LENGTHS = (9, 1, 4, 7, 5)


def ragged(model, lengths=LENGTHS, width=9, left=False, seed=0):
    """Random ids of these lengths with their mask, padded on one side."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, model.config.vocab_size, (len(lengths), width), generator=random)
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id or 0), "attention_mask": mask}


def states(model, batch, **more):
    """Last states of the base model."""
    with torch.no_grad():
        return Anatomy.of(model).base(**batch, **more)[0]


def check_states(model, packed, batch):
    mask = batch["attention_mask"].bool()
    before, after = states(model, batch), states(packed, batch)
    torch.testing.assert_close(after[mask], before[mask], **EXACT)
    assert torch.equal(after[~mask], torch.zeros_like(after[~mask]))
    assert is_packed(packed) and not is_packed(model)
