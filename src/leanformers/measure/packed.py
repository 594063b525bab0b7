"""What packing brings on one's own data: padded, length-sorted and packed, on the same rows in the same rounds.

Rows come in the order in which they stand in the data, as requests do. Sorting them by length first is the other way
to save padding, and the honest competitor; it needs all rows in advance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.measure.batches import Measurable, RealBatches, arriving_batches, real_batches
from leanformers.measure.latency import SECONDS, Candidate, Timing, time_together
from leanformers.runtimes import Prepared, check, prepare

PACKED = {"torch": "torch-packed", "torch-compile": "torch-packed-compile"}
_WORTH = 0.95  # of the other's time; nearer than that a clock on a shared machine cannot tell


@dataclass(frozen=True, kw_only=True)
class PackedComparison:
    """Seconds per batch of each way, and their ratios.

    real: share of real tokens in batches as they arrive (ByteTransformer's alpha); sorted_real: in sorted ones.
    padded, sorted, packed: seconds per batch of `batch_size` rows. over_padded, over_sorted: packed's time over
    theirs, from pairs within rounds. predicted: the share of FLOPs that is left, which packed's time over padded's
    would be if time went with FLOPs. difference: the largest between padded and packed outputs at real tokens;
    scale: the largest of the outputs.
    """

    real: float
    sorted_real: float
    padded: float
    sorted: float
    packed: float
    over_padded: float
    over_sorted: float
    predicted: float
    difference: float
    scale: float
    runtime: str
    batch_size: int
    rows: int
    rounds: int
    device: str

    def advice(self) -> str:
        """What to expect, in a sentence or two."""
        if self.over_padded > _WORTH:
            return (
                f"Packing brings nothing here: {self.real:.0%} of the padded positions are real tokens. Stay with the "
                "model as it is."
            )
        gain = f"Packed, batches as they arrive take {self.over_padded:.2f}x of the time"
        if self.over_sorted <= _WORTH:
            return f"{gain}, and {self.over_sorted:.2f}x of what sorting by length would leave: pack."
        if self.over_sorted <= 1 / _WORTH:
            return f"{gain}, about what sorting all rows by length does: pack where rows cannot wait to be sorted."
        return f"{gain}; sorting by length takes less ({1 / self.over_sorted:.2f}x of packed), if all rows are at hand."

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "advice": self.advice()}


def compare_packed(
    model: Any,
    task: Measurable,
    tokenizer: Any,
    *,
    runtime: str = "torch",
    batch_size: int = 16,
    batches: int = 8,
    split: str = "test",
    seconds: float = SECONDS,
) -> PackedComparison:
    """Time a model padded, length-sorted and packed on the first rows of a split, interleaved.

    Args:
        runtime: "torch" or "torch-compile", of all three.
        The rest is as in `measure`.

    Raises:
        LeanError: a model that cannot be packed, another runtime, a split without rows.
    """
    if runtime not in PACKED:
        raise LeanError(f"Packing runs in {' and '.join(PACKED)}, not in {runtime!r}: choose one of them.")
    check(PACKED[runtime])
    packed = prepare(model, task, PACKED[runtime])  # refuses first
    padded = prepare(model, task, runtime)
    tokenizers = {"model": tokenizer}
    arriving = arriving_batches(task, tokenizer, batch_size=batch_size, count=batches, split=split)
    ordered = real_batches(task, tokenizers, batch_size=batch_size, count=batches, split=split)["model"]
    difference, scale = _difference(padded, packed, arriving)
    candidates = {
        "padded": _candidate(padded, arriving),
        "sorted": _candidate(padded, ordered),
        "packed": _candidate(packed, arriving),
    }
    timings: Mapping[str, Timing] = time_together(candidates, seconds=seconds)
    return PackedComparison(
        real=1 - arriving.padding,
        sorted_real=1 - ordered.padding,
        padded=timings["padded"].latency,
        sorted=timings["sorted"].latency,
        packed=timings["packed"].latency,
        over_padded=timings["packed"].ratio,
        over_sorted=timings["packed"].ratio / timings["sorted"].ratio,
        predicted=_share_of_flops(model, arriving),
        difference=difference,
        scale=scale,
        runtime=runtime,
        batch_size=batch_size,
        rows=sum(arriving.examples),
        rounds=timings["packed"].rounds,
        device=str(packed.device),
    )


def _candidate(prepared: Prepared, real: RealBatches) -> Candidate:
    placed = [prepared.place(batch) for batch in real.batches]
    return Candidate(call=prepared, batches=placed, tokens=sum(real.tokens), device=prepared.device)


def _difference(padded: Prepared, packed: Prepared, real: RealBatches) -> tuple[float, float]:
    worst, largest = 0.0, 0.0
    for batch in real.batches:
        before, after = padded(batch).float(), packed(batch).float()
        mask = batch.get("attention_mask")
        if mask is not None and before.shape[:2] == mask.shape and before.dim() > 2:  # outputs of every token
            real_tokens = mask.bool().to(before.device)
            before, after = before[real_tokens], after[real_tokens]
        worst = max(worst, float((before - after).abs().max()))
        largest = max(largest, float(before.abs().max()))
    return worst, largest


def _share_of_flops(model: Any, real: RealBatches) -> float:
    """FLOPs of the layers on the real tokens, over those on the padded rows."""
    anatomy = Anatomy.of(model)
    packed = padded = 0
    for batch in real.batches:
        mask: torch.Tensor = batch["attention_mask"]
        padded += len(mask) * anatomy.layer_flops(mask.shape[1])
        packed += sum(anatomy.layer_flops(length) for length in mask.sum(1).tolist() if length)
    return packed / padded
