"""Zero-TPrune against random dropping, the class token's attention and merging (ToMe), at equal layers and counts.

Small ViTs of 196 patches and a class token, trained from scratch on MNIST digits (28 x 28, patch 2) and on digits at
random places of 56 x 56 noise (patch 4), are pruned to 80, 65 and 50 % of their layers' FLOPs without tuning.
Throughput is measured on one, and on a model of DeiT-S's shape with random weights, on which time does not depend.

    python evidence/zero-tprune.py                   # on a GPU
    python evidence/zero-tprune.py --small           # a dry run: one seed, 49 tokens, hardly trained
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import digits
from claim import Evidence, arguments
from common import device
from leanformers.anatomy import Anatomy
from leanformers.measure.cost import count_flops
from leanformers.methods import Subject
from leanformers.methods.run.zero_tprune import ZeroTPrune
from leanformers.parts.page_rank import PageRank
from leanformers.parts.token_reducers import reduction
from leanformers.parts.token_rules import lowest, ranked
from leanformers.surgery import ReduceTokens, apply
from tome import merged

SHARES = (0.8, 0.65, 0.5)
SIZES = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 384}
PLACEMENTS = 6  # of each training digit on the noise
BATCH = 64


# -- data ----------------------------------------------------------------------------------------------------------


class Scattered(digits.Digits):
    """Rows {"image": place in `scenes()`, "label": digit}: digits at random places of 56 x 56 noise."""

    def features(self, tokenizer: Any = None, split: str = "train", limit: int | None = None) -> list[dict[str, Any]]:
        pixels = scenes()
        return [{"pixel_values": pixels[row["image"]], "labels": row["label"]} for row in self.rows(split, limit)]


_SCENES: list[Tensor] = []


def scenes() -> Tensor:
    """[5000 * PLACEMENTS, 1, 56, 56], the placements of a digit one after another."""
    if not _SCENES:
        generator = torch.Generator().manual_seed(0)
        plain = digits.images()[0] * digits.DEVIATION + digits.MEAN  # 0 to 1
        count = len(plain) * PLACEMENTS
        canvas = 0.4 * torch.rand(count, 1, 56, 56, generator=generator)
        corners = torch.randint(0, 29, (count, 2), generator=generator).tolist()
        for number, (top, left) in enumerate(corners):
            window = canvas[number, :, top : top + 28, left : left + 28]
            window.copy_(torch.maximum(window, plain[number // PLACEMENTS]))
        _SCENES.append((canvas - 0.25) / 0.25)
    return _SCENES[0]


def scattered(train: int | None = None) -> Scattered:
    splits = digits.digits().splits
    rows = {
        split: [
            {**row, "image": row["image"] * PLACEMENTS + number}
            for row in found[: train if split == "train" else None]
            for number in range(PLACEMENTS if split == "train" else 1)
        ]
        for split, found in splits.items()
    }
    return Scattered("scattered-digits", rows)


def trained(data: str, seed: int, small: bool) -> Subject:
    """A model trained from scratch."""
    pixels = 28 if data == "digits" else 56
    patch = pixels // (7 if small else 14)
    model: Any = digits.vit(seed, **SIZES, image_size=pixels, patch_size=patch)
    model.to(device())
    task = digits.digits(100 if small else None, seed) if data == "digits" else scattered(50 if small else None)
    subject = Subject(model=model, task=task, seed=seed)
    epochs = 1.0 if small else 40.0 if data == "digits" else 12.0
    subject.train(epochs, 1e-3, batch_size=50 if data == "digits" else 100, warmup=0.1)
    subject.model.eval()
    return subject


# -- what it is compared with: other scores, the same counts ---------------------------------------------------------


class Random(PageRank):
    """Any tokens."""

    def scores(self, place: int, probabilities: Tensor, key: Tensor, real: Tensor | None) -> Tensor:
        return torch.rand(probabilities.shape[0], probabilities.shape[-1], device=probabilities.device)

    def flops(self, place: int, tokens: int, heads: int, width: int) -> int:
        return 0


class ClassAttention(Random):
    """The tokens that the class token looks at."""

    def scores(self, place: int, probabilities: Tensor, key: Tensor, real: Tensor | None) -> Tensor:
        return probabilities[:, :, 0].mean(1)


class PlainMean(PageRank):
    """Heads joined by their mean, none left out."""

    def attended(self, *_: Any) -> None:
        """By no kernel."""

    def importance(self, probabilities: Tensor, alive: Tensor | None, votes: int, *, renormalise: bool) -> Tensor:
        return self.page_rank(probabilities, alive, votes, renormalise=renormalise).mean(1)


class NoCopies(PageRank):
    """Importance alone decides."""

    def scores(self, place: int, probabilities: Tensor, key: Tensor, real: Tensor | None) -> Tensor:
        return self.importance(probabilities, None, self.votes[place], renormalise=False)


class CopiesLast(PageRank):
    """Importance first, then copies among what stays."""

    def scores(self, place: int, probabilities: Tensor, key: Tensor, real: Tensor | None) -> Tensor:
        found = self.importance(probabilities, None, self.votes[place], renormalise=False)
        length = found.shape[1]
        size = min(length, self.count(place, length, length) + self.drop[place])
        front = torch.arange(length, device=found.device) < self.specials
        alive = torch.zeros_like(found, dtype=torch.bool)
        alive.scatter_(1, ranked(found.masked_fill(front, float("inf")), size), True)
        if not self.drop[place]:
            return lowest(alive, found)
        return lowest(alive & self.copies(place, found, key, alive).logical_not(), found)


RULES: dict[str, type[PageRank]] = {
    "zero-tprune": PageRank,
    "random": Random,
    "class attention": ClassAttention,
    "without EIR and VHF": PlainMean,
    "without S": NoCopies,
    "I before S": CopiesLast,
}
COMPARED, ABLATED = ("zero-tprune", "random", "class attention"), ("without EIR and VHF", "without S", "I before S")


# -- measuring -------------------------------------------------------------------------------------------------------


def pruned(source: Any, share: float, trials: int = 0, subject: Subject | None = None) -> tuple[Any, ReduceTokens]:
    """A copy of the model with the method's own schedule."""
    model = copy.deepcopy(source)
    if trials and subject is not None:
        one = Subject(model=model, task=subject.task, seed=subject.seed)
        ZeroTPrune(flops=share, trials=trials)(one)
        found = one.notes["zero-tprune"]
        settings = {name: value for name, value in found.items() if name != "layers"}
        return one.model, ReduceTokens(layers=found["layers"], rule="page_rank", settings=settings)
    edit = ZeroTPrune(flops=share)._edit(Anatomy.of(model))
    return apply(model, edit).eval(), edit


@torch.inference_mode()
def accuracy(run: Callable[[Tensor], Tensor], task: Any, limit: int | None = None) -> float:
    hits = total = 0
    for batch in task.batches(None, "test", limit=limit):
        answers = run(batch["pixel_values"].to(device())).argmax(-1).cpu()
        hits += int((answers == batch["labels"]).sum())
        total += len(answers)
    return hits / total


def logits(model: Any) -> Callable[[Tensor], Tensor]:
    def run(pixels: Tensor) -> Tensor:
        found: Tensor = model(pixels).logits
        return found

    return run


def left(anatomy: Anatomy, tokens: int) -> dict[int, int]:
    """Tokens after each layer that drops some."""
    found, now = {}, tokens
    for layer in anatomy.layers:
        if layer.reducer is not None:
            now = found[layer.index] = layer.reducer.kept(now, tokens)
    return found


def scoring(anatomy: Anatomy, tokens: int) -> int:
    """FLOPs of choosing, for one image."""
    total, now = 0, tokens
    for layer in anatomy.layers:
        if layer.reducer is not None:
            total += layer.reducer.score_flops(
                now, layer.attention.num_attention_heads, layer.attention.key.out_features
            )
            now = layer.reducer.kept(now, tokens)
    return total


def compare(subject: Subject, trials: int, limit: int | None) -> dict[str, Any]:
    """Accuracies of every rule at every share, and what the counts and the counter say."""
    torch.manual_seed(subject.seed)
    source, task = subject.model, subject.task
    found: dict[str, Any] = {"dense": accuracy(logits(source), task, limit), "shares": {}}
    tokens = source.vit.embeddings.position_embeddings.shape[1]
    whole = Anatomy.of(source)
    for share in SHARES:
        model, edit = pruned(source, share)
        row: dict[str, Any] = {}
        after = Anatomy.of(model)
        shared = reduction(model)
        assert shared is not None
        for name in COMPARED + (ABLATED if share == 0.65 else ()):
            shared.rule = RULES[name](len(edit.layers), 1, **edit.settings)
            row[name] = accuracy(logits(model), task, limit)
        shared.rule = PageRank(len(edit.layers), 1, **edit.settings)
        sizes = left(after, tokens)
        row["ToMe"] = accuracy(partial(merged, source, sizes=sizes), task, limit)
        if share == 0.65 and trials:
            searched, _ = pruned(source, share, trials, subject)
            row["searched"] = accuracy(logits(searched), task, limit)
        one = scenes()[:1] if isinstance(task, Scattered) else digits.images()[0][:1]
        there = copy.deepcopy(model).cpu()  # where no kernel hides from the counter
        counted = count_flops(partial(there, one), there).total
        row["tokens"] = sizes
        row["flops_share"] = after.layer_flops(tokens) / whole.layer_flops(tokens)
        row["counted_over_formula"] = counted / (after.flops(tokens) + _patches(model, tokens))
        row["scoring_share"] = scoring(after, tokens) / after.layer_flops(tokens)
        found["shares"][share] = row
    return found


def _patches(model: Any, tokens: int) -> int:
    """FLOPs of the convolution that makes tokens of patches, which the anatomy leaves out."""
    weight = model.vit.embeddings.patch_embeddings.projection.weight
    return 2 * weight.numel() * (tokens - 1)


def _clock(call: Callable[[], Any], repeats: int) -> float:
    if device() == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


@torch.inference_mode()
def throughput(source: Any, rounds: int, repeats: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Images per second at batch 64, dense and at each share; and with the same counts but no scores, which tells what
    scoring costs. Models take turns in each round, and ratios are medians over rounds."""
    source = copy.deepcopy(source).to(device(), dtype)
    shape = (BATCH, source.config.num_channels, source.config.image_size, source.config.image_size)
    pixels = torch.randn(shape, device=device(), dtype=dtype)
    calls: dict[str, Callable[[], Any]] = {"dense": partial(source, pixels)}
    for share in SHARES:
        model, edit = pruned(source, share)
        calls[f"{share}"] = partial(model, pixels)
        if share == 0.65:
            free = copy.deepcopy(model)
            shared = reduction(free)
            assert shared is not None
            shared.rule = ClassAttention(len(edit.layers), 1, **edit.settings)
            calls["0.65, scored by class attention"] = partial(free, pixels)
    for call in calls.values():
        _clock(call, max(2, repeats // 4))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(_clock(call, repeats))
    gains = {
        name: median(dense / own for dense, own in zip(seconds["dense"], times, strict=True))
        for name, times in seconds.items()
    }
    return {"images_per_second": {name: BATCH / median(times) for name, times in seconds.items()}, "gain": gains}


def deit_s(small: bool) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
    }
    torch.manual_seed(0)
    config: Any = ViTConfig(**sizes, image_size=64 if small else 224, patch_size=16)
    return ViTForImageClassification(config).eval()


# -- the claim -------------------------------------------------------------------------------------------------------


def main() -> None:
    given = arguments(__doc__).parse_args()
    small: bool = given.small
    seeds = (0,) if small else (0, 1, 2)
    with Evidence(
        "zero-tprune",
        claim="Tokens chosen by the attention graph can go without tuning, at less loss than by simpler rules",
        paper="Wang, Dedhia, Jha (2024), Zero-TPrune",
        seeds=seeds,
        folder=given.results,
    ) as evidence:
        found: dict[str, list[dict[str, Any]]] = {}
        for data in ("digits", "scattered"):
            for seed in seeds:
                begin = time.perf_counter()
                subject = trained(data, seed, small)
                told = compare(subject, 2 if small else 30, 100 if small else None)
                found.setdefault(data, []).append(told)
                print(f"{data}, seed {seed}, {time.perf_counter() - begin:.0f} s: {told}", flush=True)

        def of(data: str, share: float, name: str) -> float:
            return mean(one["shares"][share][name] for one in found[data])

        rounds, repeats = (2, 1) if small else (15, 10)
        times = {
            "small ViT": throughput(subject.model, rounds, repeats),
            "DeiT-S shape": throughput(deit_s(small), rounds, repeats),
        }
        if device() == "cuda":
            times["DeiT-S shape, bfloat16"] = throughput(deit_s(small), rounds, repeats, torch.bfloat16)
        print(times, flush=True)
        names = {share: [*COMPARED, "ToMe"] for share in SHARES}
        names[0.65] += [*ABLATED, "searched"]
        first = found["digits"][0]["shares"]
        evidence.baseline = {
            data: {"dense accuracy": mean(one["dense"] for one in told)} for data, told in found.items()
        }
        table = {data: {share: {n: of(data, share, n) for n in names[share]} for share in SHARES} for data in found}
        evidence.result = {
            "accuracy": table,
            "by seed": found,
            "throughput": times,
        }
        for data in found:
            dense = evidence.baseline[data]["dense accuracy"]
            for share in SHARES:
                gain = 100 * (of(data, share, "zero-tprune") - of(data, share, "random"))
                evidence.check(f"{data}, {share:.0%} of the FLOPs: over random dropping, points", gain, "> 0")
            over = 100 * (of(data, 0.65, "zero-tprune") - of(data, 0.65, "class attention"))
            evidence.check(f"{data}, 65% of the FLOPs: over the class token's attention, points", over, ">= 0")
            lost = 100 * (dense - of(data, 0.65, "zero-tprune"))
            evidence.check(f"{data}, 65% of the FLOPs: accuracy lost, points", lost, "<= 1")
        rows = [row for told in found.values() for one in told for row in one["shares"].values()]
        ratios = [row["counted_over_formula"] for row in rows]
        farthest = max(ratios, key=lambda ratio: abs(ratio - 1))
        evidence.check("FLOPs by the counter over the formula's, farthest from 1", farthest, "== 1")
        deit = Anatomy.of(pruned(deit_s(small), 0.65)[0])
        base: Any = deit.base
        size = base.embeddings.position_embeddings.shape[1]
        shares = scoring(deit, size) / deit.layer_flops(size)
        evidence.result["scoring share"] = {"digits": first[0.65]["scoring_share"], "DeiT-S shape": shares}
        evidence.check("Scoring's share of the FLOPs, DeiT-S shape at 65%", shares, "<= 0.03")
        if not evidence.holds:
            evidence.cause = (
                "choosing by attention has nothing to go by in these small models: the class token's own "
                "attention loses to random dropping too, and the scattered digits are read at 45 % only; "
                "ToMe, which merges tokens instead of dropping them, loses least"
            )


if __name__ == "__main__":
    main()
