"""SliceGPT on SmolLM2-135M-Instruct, documentation text: principal axes against others at equal width, then LoRA.

All variants have the same shortcuts, the same calibration text and the same sizes; they differ in the axes alone.
Held-out docstrings are scored. The time per layer is fitted against the width on tiny random models. For a GPU;
--small is a dry run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers as T
from torch import Tensor

from claim import Evidence, arguments
from common import copied, device, mean, perplexity, subject, treat
from leanformers.methods import Subject
from leanformers.methods.compress.slicegpt import SliceGPT, _texts, principal, slice_along, turned

SLICES = (0.1, 0.2, 0.3)
SEEDS = (0, 1, 2)
ALL = ("query", "key", "value", "output", "gate", "up", "down")


def by_energy(moment: Tensor) -> Tensor:
    """The stream's own coordinates, those of highest energy first."""
    order = moment.diagonal().argsort(descending=True)
    return torch.eye(len(moment), dtype=moment.dtype, device=moment.device)[:, order]


def at_random(seed: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda moment: turned(
        torch.eye(len(moment), dtype=moment.dtype, device=moment.device), len(moment), generator
    )


def kept_in(bases: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Principal axes, which go into the list too."""

    def axes(moment: Tensor) -> Tensor:
        bases.append(principal(moment))
        return bases[-1]

    return axes


def turning(bases: list[Tensor], settings: SliceGPT) -> Callable[[Tensor], Tensor]:
    """The same axes, those that stay turned at random among themselves, whatever the signal."""
    given, generator = iter(bases), torch.Generator().manual_seed(0)
    return lambda moment: turned(next(given), settings.size(len(moment)), generator)


def sliced(source: Subject, settings: SliceGPT, axes: Callable[[Tensor], Tensor]) -> Subject:
    result = copied(source)
    slice_along(result, settings.size(result.anatomy.hidden_size), axes, _texts(result, settings))
    return result


def difference(source: Subject, other: Subject) -> float:
    """Largest difference of the logits on held-out text, as a share of their scale."""
    batch = next(iter(source.task.batches(source.tokenizer, "test", 4, limit=4)))
    with torch.inference_mode():
        before, after = (one.task.forward(one.model, batch) for one in (source, other))
    return float((after - before).abs().max() / before.abs().max())


def layers_of(one: Subject) -> int:
    return sum(p.numel() for layer in one.anatomy.layers for p in layer.module.parameters())


def seconds_per_layer(width: int, tokens: int) -> float:
    """Slicing a tiny random model by a fifth, divided by its two layers."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // 64}
    model: Any = T.LlamaForCausalLM(T.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=256)).eval()
    model.to(device())
    task: Any = type("Task", (), {"forward": staticmethod(lambda model, batch: model(**batch).logits)})
    batches = [{"input_ids": torch.randint(0, 256, (4, 512), device=device())} for _ in range(tokens // 2048)]
    start = time.perf_counter()
    slice_along(Subject(model=model, task=task), width * 4 // 5 // 8 * 8, principal, batches)
    if device() == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / 2


def scaling(widths: tuple[int, ...], tokens: int) -> tuple[dict[str, float], float]:
    """Seconds per layer by width, and the power of the width that fits the larger half best."""
    seconds_per_layer(widths[0], tokens)  # what is set up once
    found = {width: seconds_per_layer(width, tokens) for width in widths}
    upper = list(found.items())[len(found) // 2 - 1 :]
    power = np.polyfit(np.log([width for width, _ in upper]), np.log([seconds for _, seconds in upper]), 1)[0]
    return {str(width): seconds for width, seconds in found.items()}, float(power)


def main() -> None:
    given = arguments(__doc__).parse_args()
    few: dict[str, Any] = {"samples": 8, "tokens": 640, "batch_size": 4}
    text: dict[str, Any] = few if given.small else {"samples": 1000, "tokens": 65_536, "batch_size": 16}
    slices, seeds = (SLICES[:2], SEEDS[:1]) if given.small else (SLICES, SEEDS)
    limit = 4 if given.small else None
    with Evidence(
        "slicegpt",
        claim="Principal axes lose less than the stream's own coordinates or random axes do, and LoRA regains a part",
        paper="Ashkboos et al. (ICLR 2024), SliceGPT, arXiv 2401.15024",
        seeds=seeds,
        folder=given.results,
    ) as evidence:
        source = subject("smollm2", "docstrings-lm", dtype="float32")

        def told(name: str, one: Subject) -> float:
            found = perplexity(one, limit)
            print(f"{name}: {found:.3f}", one.notes, flush=True)
            return found

        dense = told("dense", source)
        whole = treat(source, {"method": "slicegpt", "slice": 0.0, **text})
        evidence.check(
            "Logits with nothing sliced: largest difference, share of their scale", difference(source, whole), "<= 1e-4"
        )
        del whole
        table: dict[str, dict[str, Any]] = {}
        shares: dict[str, dict[str, float]] = {}
        seconds = {}
        for share in slices:
            settings = SliceGPT(slice=share, **text)
            start = time.perf_counter()
            best = treat(source, {"method": "slicegpt", "slice": share, **text})
            seconds[str(share)] = time.perf_counter() - start
            bases: list[Tensor] = []
            pca = sliced(source, settings, kept_in(bases))
            row: dict[str, Any] = {
                "principal": told(f"{share}, principal, turned", best),
                "principal, not turned": told(f"{share}, principal", pca),
                "principal, not turned, then turned": told(
                    f"{share}, the same turned", sliced(source, settings, turning(bases, settings))
                ),
                "own coordinates": told(f"{share}, own coordinates", sliced(source, settings, by_energy)),
                "random": [told(f"{share}, random", sliced(source, settings, at_random(s))) for s in seeds],
            }
            table[str(share)] = row
            shares[str(share)] = {
                "hidden_size": best.anatomy.hidden_size,
                "parameters, share of the tied original": best.anatomy.parameters() / source.anatomy.parameters(),
                "parameters of the layers, share": layers_of(best) / layers_of(source),
                "flops at 256 tokens, share": best.anatomy.flops(256) / source.anatomy.flops(256),
            }
            if share <= 0.2:
                name = f"Perplexity at {share:.0%}"
                evidence.check(f"{name}: ratio to own coordinates", row["principal"] / row["own coordinates"], "< 1")
                evidence.check(
                    f"{name}: ratio to the best of random axes", row["principal"] / min(row["random"]), "< 1"
                )
            evidence.check(
                f"Perplexity at {share:.0%}: the same subspaces turned at random, relative difference",
                abs(row["principal, not turned, then turned"] / row["principal, not turned"] - 1),
                "<= 1e-3",
            )
        rising = [dense, *(table[str(share)]["principal"] for share in slices)]
        evidence.check("Perplexity from nothing sliced to the most", rising, lambda p: p == sorted(p), "rising")
        recovery = {"method": "lora", "rank": 32, "alpha": 10.0, "dropout": 0.05, "learning_rate": 2e-4, "roles": ALL}
        steps = [{"method": "slicegpt", "slice": 0.2, **text}, {**recovery, "epochs": 1.0, "batch_size": 8}]
        if given.small:
            source.task.splits["train"] = source.task.splits["train"][:64]
        recovered = told("0.2, then LoRA", treat(source, *steps))
        evidence.check("Perplexity at 20%: LoRA's ratio to none", recovered / table["0.2"]["principal"], "< 1")
        # LoRA learns the field too, so the dense model gets the same.
        adapted = told("dense, then LoRA", treat(source, steps[1]))
        widths = (128, 256, 512) if given.small else (512, 1024, 2048, 4096)
        by_width, power = scaling(widths, 2048 if given.small else 16_384)
        evidence.check("Seconds per layer grow with the width to the power of", power, "<= 3")
        evidence.baseline = {
            "perplexity": dense,
            "perplexity after LoRA": adapted,
            "perplexity, own coordinates": {share: row["own coordinates"] for share, row in table.items()},
            "perplexity, random axes": {share: mean(row["random"]) for share, row in table.items()},
        }
        evidence.result = {
            "perplexity": {share: row["principal"] for share, row in table.items()},
            "perplexity, not turned": {share: row["principal, not turned"] for share, row in table.items()},
            "ratio to dense": {share: row["principal"] / dense for share, row in table.items()},
            "perplexity after LoRA at 20%": recovered,
            "sizes": shares,
            "seconds": seconds,
            "seconds per layer by width": by_width,
            "power of the width": power,
        }


if __name__ == "__main__":
    main()
