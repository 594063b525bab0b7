"""Lean Attention: decoding attends through a stream-K kernel, which keeps a whole GPU busy on long and ragged caches.

Source: Sanovar, Bharadwaj, St. Amant, Rühle, Rajmohan (2024, arXiv 2405.10480). The keys of all sequences and KV heads
are cut into tiles, and every thread block takes the same number of them, across the borders of heads and sequences;
what a border cuts is merged by the rule of online softmax. Exact: the model's outputs but for rounding.
Deviations: a second small kernel merges, so that no block waits for another; grouped queries are the rows of one tile;
the schedule is worked out on the device. Prompts, and masks with holes, go through SDPA as before.
Cost: FLOPs unchanged; two launches per layer, so it is for long caches and for CUDA graphs (a compiled model, a static
cache). It gains where lengths differ or heads are few for the GPU; on caches of one length it takes up to 30 % less
time than the faster SDPA on an H200, most at 4,096 to 16,384 keys of one sequence, and the same from 262,144 keys. Such
caches go to SDPA where no graph replays the step, as SDPA takes less of a CPU to launch. The kernel is
`leanformers.kernels.decode`, the attention function `leanformers.parts.decode_attention`. It is a setting of the loaded
model and not of its checkpoint: apply it again after loading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from leanformers.anatomy import Anatomy
from leanformers.kernels.decode import refusal_of_device
from leanformers.methods.base import Saving, Subject, method
from leanformers.parts.attention import switch_on
from leanformers.parts.decode_attention import DECODE, register_decode


@method("lean-attention", stage="quantise", order=90, needs=("gpu",), paper="Sanovar et al. (2024)")
@dataclass(frozen=True, kw_only=True)
class LeanAttention:
    """Decode through stream-K attention: the same tokens, less time on long caches."""

    def __call__(self, subject: Subject) -> None:
        switch_on(subject.model, register_decode())
        subject.notes["attention"] = f"{DECODE}; not stored with the weights, apply lean-attention again after loading"

    def refuses(self, anatomy: Anatomy, task: Any) -> str | None:
        attentions = (attention for layer in anatomy.layers for attention in layer.attentions())
        decoding = [attention for attention in attentions if attention.causal or attention.cross]
        if not decoding:
            return "it does not decode, and only decoding attends with one query token"
        if (more := anatomy.more_than_softmax("window")) is not None:  # a window is one run of keys
            return f"it {more}"
        if not anatomy.swappable_attention:
            return "it computes its attention itself"
        weight = next(parameter for parameter in anatomy.model.parameters() if parameter.is_floating_point())
        device = weight.device
        if weight.is_meta:  # a skeleton is advised on for where it would run
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for size in sorted({attention.head_dim for attention in decoding}):
            if (refused := refusal_of_device(device, weight.dtype, size)) is not None:
                return refused.rstrip(".")
        return None

    def estimate(self, anatomy: Anatomy, length: int = 128) -> Saving:
        return Saving()

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return []  # a search measures forward passes, where nothing is decoded
