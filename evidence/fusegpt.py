"""FuseGPT on SmolLM2-135M-Instruct: 3 and 8 of its 30 blocks go; documentation text calibrates, held-out text scores.

Deletion in the order of block influence (ShortGPT) and of macro influence; the latter with local training of B A alone,
at as many trained numbers or more; and FuseGPT. Both that train take the rate of B A, of the same candidates, with
which they do best on validation text 3 blocks less, and the loss with which FuseGPT does best there at the paper's
rates (mse); 3 blocks less at three seeds, 8 at the first. Beside them, as no part of the claim: the coefficients at
ten times their rate, and macro influence measured otherwise. For a GPU, --apart with the arms side by side; --small is
a dry run.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from claim import Evidence, arguments
from common import copied, perplexity, subject
from leanformers.methods import Subject
from leanformers.methods.compress.fusegpt import FuseGPT, Fusion
from leanformers.surgery import DropLayers
from leanformers.tasks.docstrings import docstrings_lm
from leanformers.tasks.language import CausalLM
from leanformers.training.errors import TrainingDiverged

LOSSES: tuple[Literal["kl", "kl_dim0", "mse"], ...] = ("kl", "kl_dim0", "mse")
LOSS: Literal["mse"] = "mse"
PAPER = 9.65e-6
RATES: tuple[float, ...] = (PAPER, 1e-4, 1e-3, 3e-3)  # of B A
SEEDS: tuple[int, ...] = (0, 1, 2)
CAUSE = (
    "nearly all that is regained comes from training the group locally, whatever is trained there: B A alone fits the "
    "group's outputs as well as the injection does. Macro influence weighs all that a block adds to the last block's "
    "output alike, so that late blocks, which the head hardly misses, come later in its order than they should; after "
    "the final norm it says the same"
)
SMALL: dict[str, Any] = {
    "group": 4,
    "rank": 8,
    "adapter_rank": 8,
    "samples": 4,
    "score_samples": 2,
    "length": 32,
    "batch_size": 2,
    "epochs": 2,
}


def packed(length: int) -> CausalLM:
    """Docstrings joined to texts of more than ``length`` tokens, so that calibration is of one length, unpadded."""
    whole = docstrings_lm()
    rows, text = [], ""
    for row in whole.splits["train"]:
        text = f"{text}\n\n{row['text']}" if text else row["text"]
        if len(text) > 6 * length:
            rows.append({"text": text})
            text = ""
    return CausalLM("packed docstrings", {**whole.splits, "train": rows}, max_length=length)


@torch.no_grad()
def block_by_block(source: Subject, settings: FuseGPT) -> dict[str, list[float]]:
    """Of each block of the dense model: ShortGPT's block influence (1 - cosine of its input and output), its macro
    influence, and what the causal loss gains without it, in nats; averaged over the tokens that score."""
    fusion = Fusion(copied(source), settings)
    blocks, task = fusion.blocks, source.task
    norm, head = source.anatomy.final_norms[0].module, source.model.get_output_embeddings()
    batches = fusion.batches[: -(-settings.score_samples // settings.batch_size)]
    count = source.anatomy.num_hidden_layers
    found = {name: [0.0] * count for name in ("block influence", "loss without it")}

    def loss(states: Tensor, batch: Any) -> float:
        labels = {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
        return float(task.loss(head(norm(states)), labels))

    for batch in batches:
        start = blocks.start(batch)
        states = [start.hidden_states]
        for index in range(count):
            states.append(start.run(index, states[-1]))
        whole = loss(states[-1], batch)
        for index in range(count):
            cosine = torch.cosine_similarity(states[index], states[index + 1], dim=-1).mean()
            found["block influence"][index] += (1 - cosine.item()) / len(batches)
            without = states[index]
            for later in range(index + 1, count):
                without = start.run(later, without)
            found["loss without it"][index] += (loss(without, batch) - whole) / len(batches)
    return {**found, "macro influence": list(fusion.influence().values())}


class Run:
    """One variant: its rounds, and the perplexities after some of them."""

    def __init__(self, name: str, source: Subject, settings: FuseGPT, limit: int | None) -> None:
        self.name, self.limit, self.fusion = name, limit, Fusion(source, settings)
        self.found: dict[int, dict[str, Any]] = {}

    def to(self, count: int) -> dict[str, Any]:
        """Go on until so many blocks are removed, and score a folded copy: later rounds need the unfolded parts."""
        while len(self.fusion.rounds) < count:
            done = self.fusion.round()
            losses = f"{done.losses[0]:.4g} -> {done.losses[-1]:.4g}" if done.losses else "no training"
            print(f"{self.name}: round {len(self.fusion.rounds)} removes block {done.removed}, {losses}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # others share the GPU
        so_far = copy.deepcopy(self.fusion)
        so_far.finish()
        self.found[count] = {
            "test": perplexity(so_far.subject, self.limit),
            "validation": perplexity(so_far.subject, self.limit, "validation"),
            "removed": [one.removed for one in self.fusion.rounds],
            "losses": [one.losses[-1:] for one in self.fusion.rounds],
            "numbers_trained": sum(one.trained for one in self.fusion.rounds),
        }
        print(f"{self.name}: {count} blocks less, perplexity {self.found[count]['test']:.3f}", flush=True)
        return self.found[count]


RUNS: dict[str, Run] = {}  # of this process


def quick() -> None:
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


def go_on(name: str, count: int, settings: FuseGPT, seed: int, limit: int | None) -> dict[str, Any]:
    """Begin or continue a run in this process."""
    if name not in RUNS:
        quick()
        source = subject("smollm2", packed(settings.length or 512), seed=seed, dtype="float32")
        RUNS[name] = Run(name, source, settings, limit)
    try:
        return RUNS[name].to(count)
    except TrainingDiverged as error:
        print(f"{name}: {error}", flush=True)
        return {"test": math.inf, "validation": math.inf}


class Arms:
    """Runs by name; ``apart``: each in a process of its own, so that they share a GPU, which one alone leaves idle."""

    def __init__(self, limit: int | None, *, apart: bool) -> None:
        self.limit, self.apart = limit, apart
        self.processes: dict[str, ProcessPoolExecutor] = {}

    def to(self, name: str, count: int, settings: FuseGPT, seed: int = 0) -> Future[dict[str, Any]]:
        if self.apart:
            spawn = get_context("spawn")
            process = self.processes.setdefault(name, ProcessPoolExecutor(1, mp_context=spawn))
            return process.submit(go_on, name, count, settings, seed, self.limit)
        done: Future[dict[str, Any]] = Future()
        done.set_result(go_on(name, count, settings, seed, self.limit))
        return done

    def leave(self, *names: str) -> None:
        """These runs go no further."""
        for name in names:
            RUNS.pop(name, None)
            if name in self.processes:
                self.processes.pop(name).shutdown()


@contextmanager
def after_norm(norm: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Macro influence of what the head reads, the final norm's output, instead of what goes into that norm."""
    plain = torch.cosine_similarity
    normed = mock.Mock(side_effect=lambda a, b, dim: plain(norm(a), norm(b), dim=dim))
    with mock.patch.object(torch, "cosine_similarity", normed):
        yield


def deletions(
    source: Subject, scores: list[float], settings: FuseGPT, counts: tuple[int, int], limit: int | None
) -> dict[str, Any]:
    """Perplexities by deletion alone, in the order of block influence and of macro influence, measured three ways."""
    order = sorted(range(len(scores)), key=lambda block: (scores[block], block))
    found: dict[str, Any] = {"block influence": {}}
    for count in counts:
        cut = copied(source)
        cut.apply(DropLayers(keep=tuple(sorted(order[count:]))))
        found["block influence"][count] = {"test": perplexity(cut, limit), "removed": order[:count]}
        print(
            f"block influence: {count} blocks less, perplexity {found['block influence'][count]['test']:.3f}",
            flush=True,
        )
    norm = source.anatomy.final_norms[0].module
    ways: dict[str, tuple[int, Any]] = {
        "macro influence": (settings.score_samples, nullcontext()),
        "macro influence, four times the text": (4 * settings.score_samples, nullcontext()),
        "macro influence, after the final norm": (settings.score_samples, after_norm(norm)),
    }
    for name, (samples, measured) in ways.items():
        changed = {"epochs": 0, "score_samples": samples}
        run = Run(name, copied(source), FuseGPT(**{**vars(settings), **changed}), limit)
        with measured:
            found[name] = {count: run.to(count) for count in counts}
    return found


def main() -> None:
    parser = arguments(__doc__, small="a dry run: short texts, 1 and 2 blocks go")
    parser.add_argument("--apart", action="store_true", help="the arms side by side, in processes")
    given = parser.parse_args()
    quick()
    settings, few, many, limit, rates, seeds = FuseGPT(length=512, loss=LOSS), 3, 8, None, RATES, SEEDS
    if given.small:
        settings, few, many, limit, rates, seeds = FuseGPT(**SMALL, loss=LOSS), 1, 2, 2, RATES[::2], SEEDS[:1]

    def varied(**changed: Any) -> FuseGPT:
        return FuseGPT(**{**vars(settings), **changed})

    def fused(rate: float, **changed: Any) -> FuseGPT:
        return varied(adapter_learning_rate=rate, **changed)

    def alone(rate: float) -> FuseGPT:
        # What FuseGPT trains a linear in its first three rounds, where all its groups overlap: B A and 1, 2, 3 C D.
        return fused(rate, rank=0, adapter_rank=settings.adapter_rank + 2 * settings.rank)

    arms: dict[str, Callable[[float], FuseGPT]] = {"FuseGPT": fused, "B A alone": alone}
    with Evidence(
        "fusegpt",
        claim="A removed block, injected into its neighbours, is worth more than tuning these alone, and than deletion",
        paper="Pei et al. (2024), FuseGPT, arXiv 2411.14507",
        seeds=seeds,
        folder=given.results,
    ) as evidence:
        runs = Arms(limit, apart=given.apart)
        first = {
            (arm, rate): runs.to(f"{arm} at {rate}", few, made(rate)) for arm, made in arms.items() for rate in rates
        }
        others = {loss: runs.to(f"FuseGPT, {loss}", few, fused(PAPER, loss=loss)) for loss in LOSSES if loss != LOSS}
        source = subject("smollm2", packed(settings.length or 512), dtype="float32")
        dense = perplexity(source, limit)
        print(f"dense: perplexity {dense:.3f}", flush=True)
        alone_by_block = block_by_block(source, settings)
        deleted = deletions(source, alone_by_block["block influence"], settings, (few, many), limit)

        sweep = {arm: {rate: first[arm, rate].result() for rate in rates} for arm in arms}
        by_loss = {loss: run.result() for loss, run in others.items()} | {LOSS: sweep["FuseGPT"][PAPER]}
        validation = {arm: {rate: one["validation"] for rate, one in sweep[arm].items()} for arm in arms}
        best = {arm: min(validation[arm], key=validation[arm].__getitem__) for arm in arms}
        print(f"chosen on validation: {best}", flush=True)
        runs.leave(*(f"FuseGPT, {loss}" for loss in others))
        runs.leave(*(f"{arm} at {rate}" for arm, rate in first if rate != best[arm]))
        chosen = {arm: made(best[arm]) for arm, made in arms.items()}
        later = {arm: runs.to(f"{arm} at {best[arm]}", many, chosen[arm]) for arm in arms}
        again = {
            (arm, seed): runs.to(f"{arm}, seed {seed}", few, chosen[arm], seed) for seed in seeds[1:] for arm in arms
        }
        faster = varied(adapter_learning_rate=best["FuseGPT"], learning_rate=10 * settings.learning_rate)
        coefficients = runs.to("FuseGPT, faster coefficients", few, faster)
        found = {
            arm: {few: [sweep[arm][best[arm]], *(again[arm, seed].result() for seed in seeds[1:])]} for arm in arms
        }
        for arm in arms:
            found[arm][many] = [later[arm].result()]
        evidence.baseline = {"perplexity": dense}
        evidence.result = {
            "block_by_block": alone_by_block,
            "deletion": deleted,
            "by_blocks_and_seed": found,
            "validation_by_rate_of_BA": validation,
            "test_by_rate_of_BA": {arm: {rate: one["test"] for rate, one in sweep[arm].items()} for arm in arms},
            "rate_of_BA_chosen_on_validation": best,
            "FuseGPT_validation_by_loss_at_the_papers_rates": {
                loss: one["validation"] for loss, one in by_loss.items()
            },
            "FuseGPT_with_ten_times_the_rate_of_the_coefficients": coefficients.result(),
            "rank_of_BA_alone": chosen["B A alone"].adapter_rank,
        }
        runs.leave(*runs.processes)
        judge(evidence, found, deleted, few, many)


def judge(evidence: Evidence, found: Any, deleted: Any, few: int, many: int) -> None:
    def log_of(arm: str, count: int) -> float:
        return statistics.fmean(math.log(one["test"]) for one in found[arm][count])

    dense, by_macro = evidence.baseline["perplexity"], deleted["macro influence"][few]["test"]
    ratio = by_macro / deleted["block influence"][few]["test"]
    evidence.check(f"Perplexity {few} blocks less, macro over block influence", ratio, "<= 1")
    recovered = (math.log(by_macro) - log_of("FuseGPT", few)) / math.log(by_macro / dense)
    evidence.check(f"Share of deletion's loss that FuseGPT recovers, {few} blocks less", recovered, ">= 0.5")
    for count in (few, many):
        ratio = math.exp(log_of("FuseGPT", count) - log_of("B A alone", count))
        evidence.check(f"Perplexity {count} blocks less, FuseGPT over B A alone", ratio, "<= 1")
    if not evidence.holds:
        evidence.cause = CAUSE


if __name__ == "__main__":
    main()
