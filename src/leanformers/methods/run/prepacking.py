"""Prepacking: the prompts of a batch are prefilled end to end, without padding, and decoded together as ever.

Source: Zhao, Israel, Van den Broeck, Grover (2024, arXiv 2404.09529). Each prompt but for its last token is laid into a
row, first-fit-decreasing; positions restart and attention stays within a prompt; the cache is unpacked, padded on the
left, in the order of the prompts, and the last tokens are fed in the first step. Exact: the same tokens.
Deviations: attention by lengths (`leanformers.kernels.varlen_attention`) where there is a kernel, so that rows may be
long and no mask is made; the packed cache is never held, since every layer is unpacked as it is computed.
Cost: linear FLOPs fall by the share of padding, attention from k M^2 to half the sum of l^2; a batch without padding is
prefilled as before. It is a setting of the loaded model and not of its checkpoint: apply it again after loading, or
call `leanformers.prepack`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from leanformers.anatomy import Anatomy
from leanformers.methods.base import Saving, Subject, method
from leanformers.packing.generating import is_prepacked, switch_on
from leanformers.packing.support import refusal_to_prefill


@method("prepacking", stage="quantise", order=91, paper="Zhao et al. (2024)")
@dataclass(frozen=True, kw_only=True)
class Prepacking:
    """Prefill prompts of different lengths without padding: the same tokens, sooner and in less memory."""

    def __call__(self, subject: Subject) -> None:
        switch_on(subject.model)
        subject.notes["generate"] = (
            "prefills without padding; not stored with the weights, apply prepacking after loading"
        )

    def refuses(self, anatomy: Anatomy, task: Any) -> str | None:
        if is_prepacked(anatomy.model):
            return "it prefills without padding already"
        if (refused := refusal_to_prefill(anatomy.model)) is not None:
            return refused.rstrip(".")
        if not anatomy.model.can_generate():
            return "it has no head to generate with"
        return None

    def estimate(self, anatomy: Anatomy, length: int = 128) -> Saving:
        return Saving()  # of a batch without padding

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return []  # a search measures forward passes, where nothing is generated
