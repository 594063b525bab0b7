"""DSFormer on MiniLM: dictionaries and a few atoms a row against other ways to spend as many bits.

(1) Weights alone: relative error of the 36 linears of all-MiniLM-L6-v2, dense-sparse against SVD at equal bits.
(2) Fine-tuned on 3,000 rows of *sentiment* (or, with --task docstrings-library, of the card's own task, which is
lexical: result dsformer-library), then factorised and trained as many steps each: (a) straight-through factoriser, (b)
its pattern fixed from the start, (c) SVD, (d) the largest weights, straight-through, (e) dense. Each form of (a) to (d)
takes, of the same candidates, the learning rate of its factors with which it does best on the validation rows at 2.8x,
mean of the seeds; the test rows judge.
(3) (a) with dictionaries and values rounded to int8; no format stores that, so its bits are computed.
For a GPU, several trainings side by side; --small is a dry run, --weights does (1) alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from claim import Evidence, arguments
from common import copied, device, mean, quality, subject, treat
from leanformers.methods import Subject
from leanformers.methods.compress import dsformer
from leanformers.methods.compress.dsformer import rank_of
from leanformers.parts import DenseSparseLinear
from leanformers.parts.dictionary import Factors, blocks_of, factorise
from leanformers.surgery import FactoriseLinear
from leanformers.tasks import task
from leanformers.training import Penalty

RATIOS = (2.0, 2.8, 3.57)
WIDTH, NONZEROS, BITS = 32, 4, 32
FORMS = ("straight_through", "fixed_pattern", "svd", "largest")
EPOCHS, RATE = 3.0, 3e-5
FACTOR_RATES = (5e-5, 2e-4, 5e-4, 1e-3, 2e-3)
CAUSE = (
    "three epochs over 3,000 rows teach dense-sparse factors less than the dense linears know, and which atoms a row "
    "uses is settled by the first factorisation: learned and fixed choices differ by less than their seeds do"
)
SWEPT = 2.8  # the ratio at which the rates are chosen


class Rates(Penalty):
    """No loss: a learning rate of their own for these parameters, as the method gives its factors."""

    def __init__(self, parameters: list[nn.Parameter], rate: float) -> None:
        super().__init__()
        self.given, self.rate = tuple(parameters), rate

    def forward(self) -> Tensor:
        return torch.zeros((), device=self.given[0].device)

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.given), "lr": self.rate, "weight_decay": 0.0}]


class Largest(nn.Module):
    """The largest share of a weight, the gradient going to all of it."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, weight: Tensor) -> Tensor:
        count = max(1, round(self.share * weight.numel()))
        least = weight.detach().abs().flatten().topk(count, sorted=False).values.min()
        return weight + (weight * (weight.abs() >= least) - weight).detach()


def svd_rank(ratio: float, out_features: int, in_features: int) -> int:
    return int(out_features * in_features / ratio / (out_features + in_features))


def weights_alone(ratio: float, iterations: int) -> dict[str, float]:
    """Relative Frobenius error over all linears: dense-sparse, and SVD at equal bits."""
    model = subject("minilm", task("sentiment", size=100))
    wrong, total = {"dense_sparse": 0.0, "svd": 0.0}, 0.0
    for linear in model.anatomy.linears().values():
        weight = linear.weight().detach()
        out_features, in_features = weight.shape
        rank = rank_of(ratio, out_features, in_features, WIDTH, NONZEROS, BITS)
        found = factorise(weight, WIDTH, rank, NONZEROS, iterations=iterations)
        sparse = torch.zeros(len(found.dictionary), out_features, rank, device=weight.device)
        sparse.scatter_(-1, found.indices.transpose(0, 1), found.values.transpose(0, 1))
        wrong["dense_sparse"] += float((blocks_of(weight, WIDTH) - sparse @ found.dictionary).square().sum())
        tail = torch.linalg.svdvals(weight)[svd_rank(ratio, out_features, in_features) :]
        wrong["svd"] += float(tail.square().sum())
        total += float(weight.square().sum())
    return {name: (value / total) ** 0.5 for name, value in wrong.items()}


def low_rank(source: Subject, ratio: float, rate: float, given: argparse.Namespace) -> Subject:
    result, parameters = copied(source), []
    for path, linear in result.anatomy.linears().items():
        rank = svd_rank(ratio, linear.out_features, linear.in_features)
        result.apply(FactoriseLinear(path=path, rank=rank))
        part = result.anatomy.module(path)
        parameters += [part.up.weight, part.down.weight]
    result.train(given.epochs, RATE, penalty=Rates(parameters, rate), limit=given.limit)
    return result


def largest(source: Subject, ratio: float, rate: float, given: argparse.Namespace) -> Subject:
    """Magnitudes at equal bits: one bit for each place, and the values that stay."""
    result, parameters = copied(source), []
    for linear in result.anatomy.linears().values():
        parametrize.register_parametrization(linear.module, "weight", Largest(1 / ratio - 1 / BITS))
        parameters.append(linear.module.parametrizations.weight.original)
    result.train(given.epochs, RATE, penalty=Rates(parameters, rate), limit=given.limit)
    return result


def dense_sparse(source: Subject, ratio: float, rate: float, given: argparse.Namespace, **settings: Any) -> Subject:
    step = {"ratio": ratio, "width": WIDTH, "nonzeros": NONZEROS, "epochs": given.epochs, "limit": given.limit}
    rates = {"factor_learning_rate": rate, "learning_rate": RATE, "iterations": given.iterations}
    with remembered(given.folder / f"factors-{source.seed}-{ratio}.pt"):
        return treat(source, {"method": "dsformer", **step, **rates, **settings})


def fixed_pattern(source: Subject, ratio: float, rate: float, given: argparse.Namespace) -> Subject:
    return dense_sparse(source, ratio, rate, given, straight_through=False)


@contextmanager
def remembered(path: Path) -> Iterator[None]:
    """The factorisation of one tuned model at one ratio, which many trainings start from, is computed once."""
    made: list[Factors] = []

    def first(*args: Any, **settings: Any) -> Factors:
        made.append(factorise(*args, **settings))
        return made[-1]

    known = [Factors(*one) for one in torch.load(path, map_location=device())] if path.is_file() else []
    with mock.patch.object(dsformer, "factorise", mock.Mock(side_effect=known or first)):
        yield
    if not known:
        torch.save([tuple(one) for one in made], path)


@torch.no_grad()
def rounded(source: Subject, rows: int | None) -> tuple[float, float]:
    """Quality with int8 dictionaries (a scale for each atom) and values (one for each row); bits over the linears'."""
    result, before, bits = copied(source), 0.0, 0.0
    for part in result.model.modules():
        if isinstance(part, DenseSparseLinear):
            for tensor, axes in ((part.dictionary, (-1,)), (part.values, (-2, -1))):
                scale = tensor.abs().amax(axes, keepdim=True).clamp_min(1e-12) / 127
                tensor.copy_((tensor / scale).round() * scale)
                bits += 8 * tensor.numel() + BITS * scale.numel()
            bits += 8 * part.packed.numel()
            before += BITS * part.out_features * part.in_features
    return quality(result, limit=rows), before / bits


@torch.no_grad()
def latency(source: Subject, repeats: int = 30) -> float:
    """Seconds of one sentence, the least of some runs."""
    batch = next(iter(source.task.batches(source.tokenizer, "test", 1, limit=1)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        source.task.forward(source.model, batch).sum().item()
        times.append(time.perf_counter() - start)
    return min(times)


MADE: dict[str, Callable[[Subject, float, float, argparse.Namespace], Subject]] = {
    "straight_through": dense_sparse,
    "fixed_pattern": fixed_pattern,
    "svd": low_rank,
    "largest": largest,
}


def tuned(seed: int, given: argparse.Namespace) -> dict[str, float]:
    """Fine-tune the model, keep it for the other calls, and factorise it; its accuracy, and after more training."""
    base = treat(
        subject("minilm", task(given.task, size=100 if given.small else 3_000), seed=seed),
        {"method": "fine-tune", "epochs": given.tuning},
    )
    torch.save(base.model.state_dict(), given.folder / f"tuned-{seed}.pt")
    for ratio in given.ratios:
        dense_sparse(base, ratio, 0.0, given, epochs=0.0)
    more = copied(base)
    more.train(given.epochs, RATE, limit=given.limit)
    return {"tuned": quality(base, limit=given.rows), "dense": quality(more, limit=given.rows)}


@cache
def base_of(seed: int, name: str, size: int, folder: Path) -> Subject:
    found = subject("minilm", task(name, size=size), seed=seed)
    found.model.load_state_dict(torch.load(folder / f"tuned-{seed}.pt", map_location=device()))
    return found


def one(seed: int, ratio: float, form: str, rate: float, given: argparse.Namespace) -> dict[str, Any]:
    """One form trained at one rate: accuracies, and of the straight-through one what int8 leaves, and notes."""
    base = base_of(seed, given.task, 100 if given.small else 3_000, given.folder)
    if form == "distilled":
        made = dense_sparse(base, ratio, rate, given, distil=True)
    else:
        made = MADE[form](base, ratio, rate, given)
    found: dict[str, Any] = {split: quality(made, split, given.rows) for split in ("validation", "test")}
    if form == "straight_through":
        found["int8"], found["int8_ratio"] = rounded(made, given.rows)
        found["notes"] = made.notes
    print(f"seed {seed}, {ratio}x, {form} at {rate}: {found['validation']:.4f} {found['test']:.4f}", flush=True)
    return found


class Pool:
    """Calls side by side in ``workers`` processes; one of them is this one."""

    def __init__(self, workers: int) -> None:
        spawn = get_context("spawn")
        self.workers = ProcessPoolExecutor(workers, mp_context=spawn) if workers > 1 else None

    def __call__(self, call: Callable[..., Any], each: list[tuple[Any, ...]], given: argparse.Namespace) -> list[Any]:
        if self.workers is None:
            return [call(*values, given) for values in each]
        return list(self.workers.map(call, *zip(*each, strict=True), [given] * len(each)))


def swept(call: Pool, seeds: tuple[int, ...], given: argparse.Namespace) -> dict[tuple[str, float], list[Any]]:
    """Every form at every rate, by seed, at one ratio."""
    pairs = list(product(FORMS, given.rates))
    found = call(one, [(seed, SWEPT, form, rate) for form, rate in pairs for seed in seeds], given)
    return {pair: found[i * len(seeds) : (i + 1) * len(seeds)] for i, pair in enumerate(pairs)}


def latencies(seed: int, given: argparse.Namespace) -> dict[str, float]:
    """Seconds of one sentence: dense, multiplied out at load, and with factors."""
    base = base_of(seed, given.task, 100 if given.small else 3_000, given.folder)
    modes = {
        mode: dense_sparse(base, SWEPT, 0.0, given, mode=mode, epochs=0.0) for mode in ("materialised", "factored")
    }
    return {name: latency(made) for name, made in {"dense": base, **modes}.items()}


def judge(evidence: Evidence, errors: dict[float, dict[str, float]], accuracy: dict[str, dict[float, float]]) -> None:
    for ratio, error in errors.items():
        share = error["dense_sparse"] / error["svd"]
        evidence.check(f"Weights alone at {ratio}x: error over SVD's at equal bits", share, "< 1")
        gain = 100 * (accuracy["straight_through"][ratio] - accuracy["fixed_pattern"][ratio])
        evidence.check(f"Learned over fixed pattern at {ratio}x, points", gain, ">= 0")
    last = max(errors)
    ahead = 100 * (accuracy["straight_through"][last] - accuracy["svd"][last])
    evidence.check(f"Over SVD at {last}x, points", ahead, "> 0")
    lost = 100 * (evidence.baseline["accuracy"] - accuracy["straight_through"][SWEPT])
    evidence.check("Lost to dense at 2.8x of the linears' bits, points", lost, "<= 1")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--weights", action="store_true", help="the weights alone, no result is written")
    parser.add_argument("--task", default="sentiment", help="sentiment or docstrings-library")
    parser.add_argument("--workers", type=int, default=1, help="trainings side by side")
    given = parser.parse_args()
    given.epochs, given.tuning, given.limit, given.rows, given.iterations = EPOCHS, 3.0, None, None, 15
    seeds: tuple[int, ...] = (0, 1, 2)
    given.ratios, given.rates = RATIOS, FACTOR_RATES
    if given.small:
        given.epochs, given.tuning, given.limit, given.rows, given.iterations = 0.5, 0.5, 32, 32, 1
        seeds, given.ratios, given.rates = (0,), (SWEPT,), FACTOR_RATES[1:3]
    errors = {ratio: weights_alone(ratio, given.iterations) for ratio in (RATIOS if given.weights else given.ratios)}
    print(f"weights alone {errors}", flush=True)
    if given.weights:
        return
    slug = "dsformer" if given.task == "sentiment" else f"dsformer-{given.task.rsplit('-', 1)[-1]}"
    with (
        tempfile.TemporaryDirectory() as folder,
        Evidence(
            slug,
            claim="At equal bits, dictionaries with learned choices keep more accuracy than low rank or fixed choices",
            paper="Chand, Prabhu, Kumar (2023), DSFormer, arXiv 2312.13211",
            seeds=seeds,
            folder=given.results,
        ) as evidence,
    ):
        given.folder, call = Path(folder), Pool(given.workers)
        others = call(tuned, [(seed,) for seed in seeds], given)
        sweep = swept(call, seeds, given)
        validation = {
            form: {rate: mean(run["validation"] for run in sweep[form, rate]) for rate in given.rates} for form in FORMS
        }
        chosen = {form: max(validation[form], key=validation[form].__getitem__) for form in FORMS}
        print(f"validation {validation}, chosen {chosen}", flush=True)
        rest = [(form, ratio) for form, ratio in product(FORMS, given.ratios) if ratio != SWEPT]
        calls = [(seed, ratio, form, chosen[form]) for form, ratio in rest for seed in seeds]
        calls += [(seed, SWEPT, "distilled", chosen["straight_through"]) for seed in seeds]
        runs = call(one, calls, given)
        table: dict[str, dict[float, list[float]]] = {
            form: {SWEPT: [run["test"] for run in sweep[form, chosen[form]]]} for form in FORMS
        }
        for i, (form, ratio) in enumerate(rest):
            table[form][ratio] = [run["test"] for run in runs[i * len(seeds) : (i + 1) * len(seeds)]]
        ours = sweep["straight_through", chosen["straight_through"]]
        accuracy = {form: {ratio: mean(table[form][ratio]) for ratio in given.ratios} for form in FORMS}
        alone = {name: [other[name] for other in others] for name in ("tuned", "dense")}
        alone["int8_at_2.8"] = [run["int8"] for run in ours]
        alone["distilled_at_2.8"] = [run["test"] for run in runs[-len(seeds) :]]
        evidence.baseline = {"accuracy": mean(alone["dense"]), "accuracy_before": mean(alone["tuned"])}
        evidence.result = {
            "task": given.task,
            "relative_error_of_weights": errors,
            "accuracy_by_form_and_ratio": accuracy,
            "accuracy_by_seed": table,
            "factor_rates_chosen_on_validation": chosen,
            "validation_accuracy_by_form_and_rate_at_2.8": validation,
            "others": {name: mean(values) for name, values in alone.items()},
            "others_by_seed": alone,
            "device": device(),
            "at_2.8": {**ours[0]["notes"], "int8_ratio": ours[0]["int8_ratio"], "latency": latencies(seeds[0], given)},
        }
        judge(evidence, errors, accuracy)
        dropped = 100 * (accuracy["straight_through"][SWEPT] - mean(alone["int8_at_2.8"]))
        evidence.check("Lost to int8 on top at 2.8x, points", dropped, "<= 1")
        evidence.check("int8 on top: ratio of the linears' bits", ours[0]["int8_ratio"], "> 2.8")
        if not evidence.holds:
            evidence.cause = CAUSE


if __name__ == "__main__":
    main()
