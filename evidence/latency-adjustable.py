"""ACC elimination on MiniLM and paragraphs of 96 to 256 tokens: what survives at each speedup, trained once.

    latency-adjustable.py --train   trains and scores (a GPU for preference), and leaves quality.json in --folder
    latency-adjustable.py           times the schedules found on this machine's CPU, and writes the result

Each rule is tuned from the same dense model for one more epoch at a speedup of 2 and served at 1, 1.5, 2 and 3, by the
layers' multiply-adds: ACC elimination; as many tokens chosen by chance or from the front, at the same places; and texts
cut before the first layer to what costs the same. The dense model has that epoch too. Then the paper's own claim: ACC
elimination trained at each speedup, served at each. How long a model takes does not depend on its weights, only on the
counts, so the clock runs on untrained ones with the schedule that was found.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from claim import Evidence, arguments
from common import copied, device, mean, quality, subject
from leanformers.errors import LeanError
from leanformers.measure import environment
from leanformers.measure.latency import Candidate, time_together
from leanformers.methods import Subject
from leanformers.methods.run.latency_adjustable import LatencyAdjustable, layer_costs, observe, set_speedup
from leanformers.packing.sharing import sharing
from leanformers.parts.token_elimination import Received
from leanformers.parts.token_reducers import reduction
from leanformers.parts.token_rules import RULES
from leanformers.parts.token_schedule import lengths
from leanformers.surgery import ReduceTokens, ledger
from leanformers.tasks.checkpoints import checkpoint
from leanformers.tasks.reference import tfidf
from paragraphs import LONGEST, cut, paragraphs

SPEEDUPS = (1.0, 1.5, 2.0, 3.0)
TRAINED_AT = 2.0
RATE = 1e-4  # what the house tunes MiniLM with; half of it once it is tuned
DENSE_EPOCHS, EPOCHS = 3.0, 1.0
LENGTHS = (128, 256)
BATCHES = (1, 32)


class Chance(Received):
    """As many tokens, drawn by a generator: what is dropped at one place stays dropped."""

    def scores(self, place: int, probabilities: Any, key: Any, real: Any) -> Any:
        shape = probabilities.shape[0], probabilities.shape[-1]
        return torch.rand(shape, device=probabilities.device)


class Front(Received):
    """The first tokens."""

    def scores(self, place: int, probabilities: Any, key: Any, real: Any) -> Any:
        length = probabilities.shape[-1]
        return -torch.arange(length, device=probabilities.device).float().expand(probabilities.shape[0], length)


RULES |= {"chance": Chance, "front": Front}


def tuned(source: Subject, speedup: float, epochs: float) -> Subject:
    """ACC elimination trained at a speedup, from the dense model."""
    result = copied(source)
    settings = LatencyAdjustable(speedup=speedup, dense_epochs=0.0, epochs=epochs, learning_rate=RATE / 2)
    settings(result)
    return result


def ruled(source: Subject, like: Subject, rule: str, epochs: float) -> Subject:
    """The same schedule and training with another choice of tokens."""
    result = copied(source)
    edit: Any = ledger(like.model)[0]
    settings = {**edit.settings, "speedup": TRAINED_AT}
    result.apply(ReduceTokens(layers=edit.layers, where=edit.where, rule=rule, settings=settings))
    result.train(epochs=epochs, learning_rate=RATE / 2)
    return result


def served(one: Subject) -> dict[str, float]:
    """Accuracy at each speedup, weights as they are."""
    found = {}
    for speedup in SPEEDUPS:
        set_speedup(one.model, speedup)
        torch.manual_seed(0)
        found[f"{speedup:g}"] = quality(one)
    return found


def shortened(source: Subject, epochs: float) -> dict[str, float]:
    """Texts cut to what costs as little; trained at one speedup, served at each."""
    costs = layer_costs(source.anatomy)

    def kept(length: int, speedup: float) -> int:
        whole = sum(cost.of(length, length) for cost in costs)
        fits = [n for n in range(1, length + 1) if sum(cost.of(n, n) for cost in costs) * speedup <= whole]
        return max(fits, default=1)

    tables = {speedup: [kept(n, speedup) if n else 0 for n in range(LONGEST + 1)] for speedup in SPEEDUPS}
    result = copied(source)
    result.task = cut(source.task, tables[TRAINED_AT].__getitem__)
    result.train(epochs=epochs, learning_rate=RATE / 2)
    found = {}
    for speedup in SPEEDUPS:
        result.task = cut(source.task, tables[speedup].__getitem__)
        found[f"{speedup:g}"] = quality(result)
    return found


def train(seeds: tuple[int, ...], small: bool, file: Path) -> dict[str, Any]:
    """Everything that needs weights, by seed; written to the file after each."""
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint("minilm")))
    task = paragraphs(tokenizer, train=64 if small else None, test=32 if small else None)
    epochs = 2.0 if small else EPOCHS
    try:
        reference = tfidf(task)
    except LeanError:  # scikit-learn is not everywhere
        reference = None
    trained: dict[str, Any] = {
        "task": task.describe(),
        "tf-idf": reference.quality if reference else None,
        "environment": environment(),
        "device": torch.cuda.get_device_name() if device() == "cuda" else "cpu",
        "seeds": [],
    }
    print(f"{len(task.splits['train'])} texts, {task.labels}; TF-IDF {trained['tf-idf']}", flush=True)
    for seed in seeds:
        start = time.perf_counter()
        dense = subject("minilm", task, seed=seed)
        dense.train(epochs=2.0 if small else DENSE_EPOCHS, learning_rate=RATE)
        first, _ = observe(dense, 16 if small else 256)
        found: dict[str, Any] = {"seed": seed, "dense, not tuned further": quality(dense), "contributions": first}
        models = {}
        found["trained at"] = {}
        for speedup in SPEEDUPS:
            models[speedup] = tuned(dense, speedup, epochs)
            found["trained at"][f"{speedup:g}"] = served(models[speedup])
            print(seed, f"trained at {speedup:g}:", found["trained at"][f"{speedup:g}"], flush=True)
        # Trained at 1 no token is dropped: that is the dense model after the same epochs.
        found["dense"] = found["trained at"]["1"]["1"]
        for rule in ("chance", "front"):
            found[rule] = served(ruled(dense, models[TRAINED_AT], rule, epochs))
            print(seed, f"{rule}:", found[rule], flush=True)
        found["cut before"] = shortened(dense, epochs)
        print(seed, "cut before:", found["cut before"], flush=True)
        edit: Any = ledger(models[TRAINED_AT].model)[0]
        found["schedule"] = edit.settings
        found |= models[TRAINED_AT].notes["latency-adjustable"]
        found["seconds"] = time.perf_counter() - start
        print(seed, "ACC", [round(c, 3) for c in found["contributions"]], f"{found['seconds']:.0f} s", flush=True)
        trained["seeds"].append(found)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(trained, indent=1, default=str) + "\n", "utf-8")
    return trained


def timed(schedule: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Measured speedups over the stock model beside the formula's, by batch size and length.

    Both models read the same weights: a copy's own lie elsewhere in memory, which alone is worth up to 10 % at batch 1.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint("minilm")))
    stock = subject("minilm", paragraphs(tokenizer, train=8, test=8))
    stock.model.to("cpu").eval()
    lean = Subject(model=sharing(stock.model), tokenizer=tokenizer, task=stock.task)
    layers = tuple(range(len(lean.anatomy.layers)))
    lean.apply(ReduceTokens(layers=layers, where="before_feed_forward", rule="received", settings=schedule))
    held: Any = reduction(lean.model)
    rule = held.rule
    found: dict[str, Any] = {}
    for size in BATCHES:
        for length in LENGTHS:
            ids = torch.randint(1000, 20_000, (size, length), generator=torch.Generator().manual_seed(0))
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

            def call(given: Any, speedup: float | None = None) -> Any:
                with torch.inference_mode():
                    return lean.model(**given, speedup=speedup) if speedup else stock.model(**given)

            calls = {"stock": call} | {
                f"{speedup:g}": lambda given, speedup=speedup: call(given, speedup) for speedup in SPEEDUPS
            }
            batches = [batch] * (4 if size == 1 else 1)
            times = time_together(
                {name: Candidate(call=one, batches=batches) for name, one in calls.items()}, seconds=seconds
            )
            case = found[f"batch {size}, {length} tokens"] = {"seconds, stock": times["stock"].latency}
            for speedup in SPEEDUPS:
                rule.gamma = rule.gamma_of(speedup)
                measured, formula = 1 / times[f"{speedup:g}"].ratio, rule.expected(length)
                keep = [rule.share(place) for place in layers]
                case[f"{speedup:g}"] = {
                    "measured": measured,
                    "formula": formula,
                    "ratio": measured / formula,
                    "tokens": lengths(keep, length),
                }
            print(f"batch {size}, {length} tokens:", {s: round(case[f"{s:g}"]["measured"], 2) for s in SPEEDUPS})
    return found


def mean_of(trained: dict[str, Any], *path: str) -> float:
    values = []
    for found in trained["seeds"]:
        for name in path:
            found = found[name]
        values.append(found)
    return mean(values)


def judge(evidence: Evidence, trained: dict[str, Any], clocked: dict[str, Any]) -> None:
    names = [f"{speedup:g}" for speedup in SPEEDUPS]
    at = f"{TRAINED_AT:g}"
    dense = mean_of(trained, "dense")
    ours = {name: mean_of(trained, "trained at", at, name) for name in names}
    others = {
        rule: {name: mean_of(trained, rule, name) for name in names} for rule in ("chance", "front", "cut before")
    }
    table = {a: {b: mean_of(trained, "trained at", a, b) for b in names} for a in names}
    curves = [found["contributions"] for found in trained["seeds"]]
    curve = [statistics.fmean(values) for values in zip(*curves, strict=True)]
    evidence.baseline = {"accuracy, dense": dense, "accuracy, TF-IDF": trained["tf-idf"], "accuracy": others}
    evidence.result = {
        "accuracy": ours,
        "accuracy by training and serving speedup": table,
        "ACC by layer": curve,
        "latency": clocked,
        "by seed": trained["seeds"],
        "trained on": trained["device"],
        "task": trained["task"],
    }
    for rule, words in (("chance", "by chance"), ("front", "from the front")):
        least = min(100 * (ours[name] - others[rule][name]) for name in names)
        evidence.check(f"Accuracy over as many tokens {words}, least over the speedups, points", least, ">= 0")
    evidence.check("Accuracy lost to the dense model at 2, points", 100 * (dense - ours[at]), "<= 1")
    evidence.check("Accuracy apart from the dense model's, served at 1, points", 100 * abs(dense - ours["1"]), "<= 0.5")
    evidence.check("ACC of the last layer over the first's", curve[-1] / curve[0], "< 1")
    lost = max(100 * (table[name][name] - ours[name]) for name in names)
    evidence.check("Trained at 2: lost to training at the speedup that is served, most, points", lost, "<= 1")
    for size in BATCHES:
        gained = clocked[f"batch {size}, {LENGTHS[-1]} tokens"][at]["measured"]
        evidence.check(f"Measured speedup at 2, batch {size}, {LENGTHS[-1]} tokens", gained, "> 1")
    if not evidence.holds:
        evidence.cause = (
            "one epoch with elimination over 2,000 texts: training at the harder speedup pays only where it is served, "
            "and at 3 the last layers see three tokens of 128; which tokens go matters less than that they go, as "
            "chance shows"
        )


def main() -> None:
    parser = arguments(__doc__, small="a few texts and one seed, to try the script")
    parser.add_argument("--folder", type=Path, default=Path("runs/latency-adjustable"))
    parser.add_argument("--train", action="store_true", help="train, score, and leave the clock for later")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, for each batch size and length")
    given = parser.parse_args()
    file = given.folder / "quality.json"
    if given.train or not file.is_file():
        train((0,) if given.small else (0, 1, 2), given.small, file)
    if given.train:
        return
    trained = json.loads(file.read_text("utf-8"))
    with Evidence(
        "latency-adjustable",
        claim="Trained once at twice the speed, MiniLM serves other speeds with the same weights, and dropping what "
        "receives little attention keeps more than dropping as much by chance or from the end",
        paper="Kachuee, Sharifkhani (2022), Latency Adjustable Transformer Encoder, arXiv 2201.03327",
        seeds=[found["seed"] for found in trained["seeds"]],
        folder=given.results,
    ) as evidence:
        clocked = timed(trained["seeds"][0]["schedule"], given.seconds)
        judge(evidence, trained, clocked)


if __name__ == "__main__":
    main()
