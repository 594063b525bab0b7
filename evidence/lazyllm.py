"""LazyLLM on SmolLM2-135M-Instruct: several docstrings, then the start of a passage that repeats or continues one.

Loss of the next 32 tokens, each fed in turn, and whether the first is the dense model's, at equal mean keep over the
layers and at the same layers: the attention of the last token against chance, against one set chosen once (static)
and against the most recent tokens. The three baselines keep the first token and all that is generated. Chance is also
shown after the first layer alone, which is nearest to dropping words of the prompt. Then the time to the first token,
in turns with the dense model on SDPA, and of each further one: judged is the median of the ratios of neighbours in
time. On a GPU there are more prompts, and its times are shown and not judged. The result is that of --prompts 40
--workers 12, on as many cores.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from claim import Evidence, arguments
from common import device, subject
from leanformers.anatomy import Anatomy
from leanformers.lazy import LazyCache, mean_keep, predicted_speedup, spread
from leanformers.methods import Subject
from leanformers.methods.run.lazyllm import LazyLLM

KEEPS = (0.8, 0.6, 0.4)
START, NEXT = 32, 32  # tokens that begin the passage, and those that are scored
LENGTHS = (1024, 2048)
PROMPT = 1500  # tokens, where time is taken


class Baseline(LazyCache):
    """Keeps what is generated, and of the prompt what `rank` puts highest."""

    prompt, seed = 0, 0

    def keep(self, layer: int, scores: Tensor, visible: Tensor) -> Tensor:
        ranked = self.rank(visible).masked_fill(visible >= self.prompt, float("inf"))
        return super().keep(layer, ranked, visible)

    def rank(self, visible: Tensor) -> Tensor:
        raise NotImplementedError


class Chance(Baseline):
    """One draw per token, so that what is dropped stays dropped."""

    def rank(self, visible: Tensor) -> Tensor:
        drawn = torch.rand(int(visible[-1]) + 1, generator=torch.Generator().manual_seed(self.seed))
        return drawn.to(visible.device)[visible]


class Recent(Baseline):
    def rank(self, visible: Tensor) -> Tensor:
        return visible.float()


class Ranking(LazyCache):
    """Drops nothing, and notes which share of the tokens the last one looks at less than at `token`, by layer."""

    def __init__(self, model: Any, token: int) -> None:
        super().__init__(model, dict.fromkeys(range(len(Anatomy.of(model).layers) - 1), 1e-9))
        self.token, self.below = token, list[float]()

    def keep(self, layer: int, scores: Tensor, visible: Tensor) -> Tensor:
        self.below.append(float((scores < scores[self.token]).float().mean()))
        return super().keep(layer, scores, visible)


class Static(Baseline):
    """The set that the whole prompt's last token chooses at the first place, for good."""

    def keep(self, layer: int, scores: Tensor, visible: Tensor) -> Tensor:
        if len(visible) == self.prompt:
            kept = LazyCache.keep(self, layer, scores, visible)
            self.chosen = visible[kept]
            return kept
        return (torch.isin(visible, self.chosen) | (visible >= self.prompt)).nonzero()[:, 0]


Prompt = tuple[str, Tensor, Tensor]
RULES: Mapping[str, type[LazyCache]] = {
    "lazyllm": LazyCache,
    "random": Chance,
    "static": Static,
    "recent": Recent,
    "random prompt": Chance,
}


def schedule(rule: str, layers: int, keep: float) -> dict[int, float]:
    """Equal rates at the default places, or one at the first of them or at the first layer, or at four in the second
    half, whose mean keep is as asked."""
    places = spread(layers)[:1] if rule == "static" else spread(layers)
    if rule == "random prompt":
        places = (0,)
    if rule == "later":
        places = tuple(layers // 2 + place * (layers - layers // 2) // 4 for place in range(4))
    low, high = 0.0, 0.999
    for _ in range(50):
        middle = (low + high) / 2
        below = mean_keep(dict.fromkeys(places, middle), layers) < keep
        low, high = (low, middle) if below else (middle, high)
    return dict.fromkeys(places, low)


def pruned() -> Subject:
    lazy = subject("smollm2", "docstrings-lm", dtype="float32")
    LazyLLM()(lazy)
    return lazy


def prompts(source: Subject, count: int, seed: int = 0) -> list[Prompt]:
    """Kind, prompt [length] and the next tokens [32] of each; half of them repeat a document, half continue one."""
    dice = random.Random(seed)
    texts = [row["text"] for row in source.task.splits["test"]]
    documents = [source.tokenizer(f"{text}\n\n", add_special_tokens=False)["input_ids"] for text in texts]
    long = [one for one in documents if len(one) >= 4 * (START + NEXT)]
    drawn = []
    for index in range(count):
        kind = ("repeat", "continue")[index % 2]
        length = LENGTHS[0] + (LENGTHS[1] - LENGTHS[0]) * index // max(1, count - 1)
        chosen = dice.choice(long)
        half = len(chosen) // 2
        shown, passage = (chosen, chosen) if kind == "repeat" else (chosen[:half], chosen[half:])
        others = [one for one in dice.sample(documents, len(documents)) if one is not chosen]
        room, after = length - START - len(shown), 0
        while after < len(others) and sum(map(len, others[: after + 1])) <= room:
            after += 1  # documents that may stand behind it without cutting it off
        after = dice.randint(0, after)
        joined = [*others[after:], shown, *others[:after]]
        text = [token for one in joined for token in one][START - length :]
        ids = text + passage[:START]
        drawn.append((kind, torch.tensor(ids), torch.tensor(passage[START : START + NEXT])))
    return drawn


@torch.inference_mode()
def forced(model: Any, cache: Any, ids: Tensor, following: Tensor) -> tuple[float, int]:
    """Loss of the following tokens (nats per token), and the first token that the model would write."""
    logits = [model(ids[None], past_key_values=cache, logits_to_keep=1).logits[0, -1]]
    for token in following[:-1]:
        logits.append(model(token.view(1, 1), past_key_values=cache).logits[0, -1])
    return float(cross_entropy(torch.stack(logits).float(), following)), int(logits[0].argmax())


@torch.inference_mode()
def dense(model: Any, ids: Tensor, following: Tensor) -> tuple[float, int]:
    logits = model(torch.cat([ids, following[:-1]])[None], logits_to_keep=NEXT).logits[0]
    return float(cross_entropy(logits.float(), following)), int(logits[0].argmax())


def scored(model: Any, index: int, one: Prompt) -> dict[str, tuple[float, bool, float]]:
    """By rule and keep: the loss, whether the first token is the dense model's, and the share that was computed."""
    kind, ids, following = one[0], one[1].to(model.device), one[2].to(model.device)
    layers = len(Anatomy.of(model).layers)
    loss, first = dense(model, ids, following)
    found = {"dense": (loss, True, 1.0)}
    rules = RULES if model.device.type == "cpu" else {**RULES, "later": LazyCache}
    for keep in KEEPS:
        for rule, made in rules.items():
            rates = schedule(rule, layers, keep)
            if mean_keep(rates, layers) > keep + 0.01:
                continue  # later places cannot keep so few
            cache = made(model, rates)
            if isinstance(cache, Baseline):
                cache.prompt, cache.seed = len(ids), index
            loss, token = forced(model, cache, ids, following)
            found[f"{rule}@{keep}"] = (loss, token == first, cache.computed())
    told = {name: round(values[0], 3) for name, values in found.items()}
    print(f"prompt {index + 1}, {len(ids)} tokens, {kind}: {told}", flush=True)
    return found


def work(part: list[tuple[int, Prompt]], threads: int) -> list[tuple[int, dict[str, tuple[float, bool, float]]]]:
    """A process of its own: one sequence at a time leaves a machine idle."""
    torch.set_num_threads(threads)
    lazy = pruned().model
    return [(index, scored(lazy, index, one)) for index, one in part]


@torch.inference_mode()
def source_ranks(model: Any, drawn: list[Prompt]) -> list[float]:
    """Of prompts that repeat a document: how high its next token ranks in each layer's scores, 1 being the highest."""
    ranks = []
    for kind, ids, _ in drawn:
        start = ids[-START:]
        where = [at for at in range(len(ids) - START) if torch.equal(ids[at : at + START], start)]
        if kind == "repeat" and where:
            cache = Ranking(model, where[0] + START)
            model(ids[None].to(model.device), past_key_values=cache, logits_to_keep=1)
            ranks.append(cache.below)
    return [statistics.fmean(layer) for layer in zip(*ranks, strict=True)]


def quality(drawn: list[Prompt], workers: int, threads: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Of the dense model, and of each rule and keep."""
    parts = [list(enumerate(drawn))[place::workers] for place in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        done = [one for part in pool.map(work, parts, [threads] * workers) for one in part]
    records = [record for _, record in sorted(done, key=lambda one: one[0])]
    kinds = {kind: [index for index, one in enumerate(drawn) if one[0] == kind] for kind in ("repeat", "continue")}
    result: dict[str, Any] = {}
    for name in records[0]:
        risen = [record[name][0] - record["dense"][0] for record in records]
        result[name] = {
            "loss_increase": statistics.fmean(risen),
            "by_kind": {kind: statistics.fmean(risen[i] for i in of) for kind, of in kinds.items()},
            "first_token_agrees": statistics.fmean(record[name][1] for record in records),
            "computed_after_all_steps": statistics.fmean(record[name][2] for record in records),
        }
    del result["dense"]
    losses = [record["dense"][0] for record in records]
    base = {kind: statistics.fmean(losses[i] for i in of) for kind, of in kinds.items()}
    return {"loss": statistics.fmean(losses), **base}, result


@torch.inference_mode()
def times(stock: Any, lazy: Any, rates: dict[int, float], ids: Tensor, rounds: int) -> dict[str, Any]:
    """Seconds to the first token and of each further one, dense and lazy in turns; medians, and of the ratio."""
    few: dict[str, list[float]] = {"dense": [], "lazyllm": []}
    many: dict[str, list[float]] = {"dense": [], "lazyllm": []}
    further = NEXT // 2

    def written(name: str, count: int) -> float:
        model = stock if name == "dense" else lazy
        options: dict[str, Any] = {
            "do_sample": False,
            "pad_token_id": 0,
            "min_new_tokens": count,
            "max_new_tokens": count,
        }
        _wait(ids)
        start = time.perf_counter()
        cache = {} if name == "dense" else {"past_key_values": LazyCache(lazy, rates)}
        model.generate(ids[None], **cache, **options)
        _wait(ids)
        return time.perf_counter() - start

    for name in few:
        written(name, 2)
    for turn in range(rounds):
        for name in sorted(few, reverse=bool(turn % 2)):
            few[name].append(written(name, 1))
    for turn in range(max(1, rounds // 4)):
        for name in sorted(few, reverse=bool(turn % 2)):
            many[name].append((written(name, 1 + further) - written(name, 1)) / further)
    ratios = sorted(a / b for a, b in zip(few["dense"], few["lazyllm"], strict=True))
    return {
        "first_token_seconds": {name: statistics.median(values) for name, values in few.items()},
        "first_token_speedup": statistics.median(ratios),
        "first_token_speedup_quartiles": [ratios[rounds // 4], ratios[-1 - rounds // 4]],
        "further_token_seconds": {name: statistics.median(values) for name, values in many.items()},
    }


def _wait(ids: Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = arguments(__doc__, small=None)
    parser.add_argument("--prompts", type=int, default=None, help="by default 10, on a GPU 72")
    parser.add_argument("--workers", type=int, default=None, help="processes; by default 2, on a GPU 6")
    parser.add_argument("--rounds", type=int, default=11, help="of the timing")
    given = parser.parse_args()
    where = device()
    count = given.prompts or (72 if where == "cuda" else 10)
    workers = given.workers or (6 if where == "cuda" else 2)
    if where == "cpu":
        torch.set_num_threads(2)
    with Evidence(
        "lazyllm" if where == "cpu" else "lazyllm-gpu",
        claim="At a mean keep of 0.6 over the layers, choosing tokens by the last one's attention and bringing them "
        "back loses less than one static choice and less than half of what chance does; on 2 CPU cores a prompt of "
        "1,500 tokens is read at least 1.3 times as fast",
        paper="Fu, Cho, Merth, Mehta, Rastegari, Najibi (2024), LazyLLM, arXiv 2407.14057",
        folder=given.results,
    ) as evidence:
        stock = subject("smollm2", "docstrings-lm", dtype="float32")
        drawn = prompts(stock, count)
        lazy = pruned()
        layers = len(lazy.anatomy.layers)
        rates = schedule("lazyllm", layers, 0.6)
        ids = torch.cat([drawn[0][1], drawn[-1][1]])[-PROMPT:].to(where)
        taken = times(stock.model, lazy.model, rates, ids, given.rounds)
        taken["predicted_speedup_of_layers"] = predicted_speedup(lazy.anatomy, rates, PROMPT)
        print(taken, flush=True)
        ranks = source_ranks(lazy.model, drawn[:8])
        evidence.baseline, found = quality(drawn, workers, threads=1)
        evidence.result = {
            "rates": {f"{keep}": schedule("lazyllm", layers, keep) for keep in KEEPS},
            "prompts": count,
            "quality": found,
            "rank_of_the_token_to_repeat_by_layer": ranks,
            "times": taken,
        }
        risen = {name: one["loss_increase"] for name, one in found.items()}
        evidence.check(
            "Loss increase at 0.6, static minus LazyLLM, nats", risen["static@0.6"] - risen["lazyllm@0.6"], "> 0"
        )
        share = risen["lazyllm@0.6"] / risen["random@0.6"]
        evidence.check("Loss increase at 0.6, share of chance's", share, "< 0.5")
        if where == "cpu":
            evidence.check("Speed-up of the first token at 1,500 tokens", taken["first_token_speedup"], ">= 1.3")
        if not evidence.holds:
            places = spread(layers)
            evidence.cause = (
                "In SmolLM2 what is to be repeated stands out in the last token's attention only late: the token that "
                f"comes next ranks above {max(ranks):.0%} of the prompt at layer {ranks.index(max(ranks))}, but above "
                f"{ranks[places[0]]:.0%} and {ranks[places[1]]:.0%} at layers {places[0]} and {places[1]}, the first "
                "to prune, so that a quarter of the layers is an early start for this model."
            )


if __name__ == "__main__":
    main()
