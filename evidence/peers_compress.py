"""Ways to shrink a trained model, side by side: SmolLM2-135M and a fine-tuned MiniLM, nothing tuned afterwards.

Each method is set so that it leaves the same share of parameters (of the tied original), then of FLOPs, as far as its
settings go; VTrans alone trains (its gates, on 2,000 texts). Beside them Torch-Pruning (feed-forward neurons by group
magnitude) and, at half of the weights zero, Wanda and SparseGPT's rule, whose zeros save nothing here. Quality of the
test rows, parameters, bytes on disk, latency in the same rounds, seconds and memory to compress. `--only` runs one
model.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from claim import RESULTS, Evidence
from common import copied, device, subject, treat
from leanformers.anatomy import count_parameters
from leanformers.anatomy.flops import model_flops
from leanformers.measure import compare
from leanformers.measure.memory import cpu_rise, gpu_rise
from leanformers.methods import Subject, get
from one_shot import prune
from vtrans import cut, magnitudes

SHARES = {"parameters": 0.85, "flops": 0.8}
ONE_SHOT, LENGTH = 0.5, 128
BY_SIZE = ("magnitude", "Torch-Pruning")
STEPS: Mapping[str, tuple[str, float, float, dict[str, Any]]] = {  # setting, where it cuts most and least, the others
    "slicegpt": ("slice", 0.6, 0.01, {}),
    "optin": ("budget", 0.1, 0.99, {"samples": 32, "rows": 512, "neuron_group": 64}),
    "vtrans": ("target", 0.9, 0.01, {"variant": "faster", "limit": 2_000}),
    "greenformers": ("rank", 0.05, 1.9, {}),
    "drop-layers": ("keep", 0.1, 1.0, {}),
}
# VTrans is set by a cost of its own: embeddings belong to the parameters that all are compared at; the head's FLOPs,
# which go with the residual width, are not in what it counts.
COSTS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "vtrans": {
        "parameters": {"embeddings": True},
        "flops": {"measure": "flops", "length": LENGTH, "hidden": False},
    }
}


def fitted(source: Subject, slug: str, what: str, share: float) -> dict[str, Any] | None:
    """The step whose estimate comes nearest to the share; None where the method does not suit the model."""
    name, most, least, others = STEPS[slug]
    others = {**others, **COSTS.get(slug, {}).get(what, {})}
    info, anatomy = get(slug), source.anatomy
    if info.unsuitable(anatomy, source.task, {name: (most + least) / 2, **others}) is not None:
        return None
    whole = count_parameters(source.model) if what == "parameters" else flops(source)

    def left(value: float) -> float:
        saving = info.build({name: value, **others}).estimate(anatomy, LENGTH)
        return 1 + (saving.parameters if what == "parameters" else saving.flops) / whole

    for _ in range(24):
        middle = (most + least) / 2
        most, least = (middle, least) if left(middle) < share else (most, middle)
    value = min((most, least), key=lambda v: abs(left(v) - share))
    return {"method": slug, name: value, **others}  # unrounded: just there a layer more would stay


def flops(source: Subject) -> int:
    return model_flops(source.anatomy, LENGTH)


def magnitude(source: Subject, what: str, share: float) -> Subject:
    """Heads and neurons with the smallest weights go."""
    whole = count_parameters(source.model) if what == "parameters" else flops(source)
    blocks = sum(count_parameters(layer.module) for layer in source.anatomy.layers)
    part = blocks if what == "parameters" else 2 * blocks * LENGTH
    return cut(source, magnitudes(source.anatomy), min(0.95, (1 - share) * whole / part), hidden=False)


def torch_pruning(source: Subject, what: str, share: float) -> Subject:
    """Torch-Pruning's MagnitudePruner on the neurons; its grouping of heads does not survive these models."""
    tp: Any = importlib.import_module("torch_pruning")  # PyPI's, no part of the set-up

    result = copied(source)
    anatomy = result.anatomy
    parts = [layer.feed_forward for layer in anatomy.layers]
    ours = {id(p.module) for part in parts for role, p in part.projections() if role != "down"}
    ignored = [m for m in result.model.modules() if isinstance(m, torch.nn.Linear) and id(m) not in ours]
    whole = count_parameters(source.model) if what == "parameters" else flops(source)
    per = sum(p.in_features * p.out_features for part in parts for _, p in part.projections())
    ratio = (1 - share) * whole / (per if what == "parameters" else 2 * per * LENGTH)
    batch = {name: value[:2, :16] for name, value in next(result.calibration(2, batch_size=2)).items()}
    pruner = tp.pruner.MagnitudePruner(
        result.model,
        batch,
        importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        pruning_ratio=ratio,
        ignored_layers=ignored,
        root_module_types=[torch.nn.Linear],
        output_transform=lambda output: output.logits,
    )
    pruner.step()
    return result


def treated(step: dict[str, Any], source: Subject) -> Subject:
    return treat(source, step)


def zeroed(rule: str) -> Callable[[Subject], Subject]:
    def make(source: Subject) -> Subject:
        result = copied(source)
        prune(result, rule, ONE_SHOT, 64)
        return result

    return make


def compressed(source: Subject, make: Callable[[Subject], Subject]) -> tuple[Subject, dict[str, Any]]:
    """What ``make`` leaves, with its seconds and its peak memory beyond the models (on a CPU what is resident)."""
    made: list[Subject] = []
    taken: list[float] = []
    place = source.model.device

    def call() -> None:
        start = time.perf_counter()
        made.append(make(source))
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        taken.append(time.perf_counter() - start)

    rise = gpu_rise(call, place) if place.type == "cuda" else cpu_rise(call)
    row: dict[str, Any] = {"seconds": taken[0]}
    if rise is not None:
        row["peak_bytes"] = max(0, rise - weights(source))  # the copy is the evidence's
    return made[0], row


def weights(of: Subject) -> int:
    return sum(p.numel() * p.element_size() for p in of.model.parameters())


def table(source: Subject, rows: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Every method at both shares, and the outside references."""
    ways: dict[str, Callable[[Subject], Subject]] = {}
    for what, share in SHARES.items():
        for slug in STEPS:
            step = fitted(source, slug, what, share)
            if step is not None:
                ways[f"{slug}, {what} {share}"] = partial(treated, step)
        for name, other in zip(BY_SIZE, (magnitude, torch_pruning), strict=True):
            ways[f"{name}, {what} {share}"] = partial(other, what=what, share=share)
    ways |= {f"{rule}, half zero": zeroed(rule) for rule in ("wanda", "sparsegpt")}
    source.evaluate("validation", 8)  # what is set up once is no method's time
    made: dict[str, Subject] = {"dense": source}
    found: dict[str, dict[str, Any]] = {"dense": {}}
    for name, make in ways.items():
        made[name], found[name] = compressed(source, make)
        print(f"{name}: {found[name]['seconds']:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / str(i) for i, name in enumerate(made)}
        for name, folder in folders.items():
            save(made[name], folder)
        entries = {name: (s.model, s.tokenizer) for name, s in made.items()}
        measured = compare(entries, source.task, limit=rows, batch_size=8, seconds=seconds, folders=folders)
    for name, m in measured.items():
        found[name] |= {
            "quality": m.quality,
            "metrics": m.metrics,
            "parameters": m.parameters,
            "bytes": m.bytes,
            "flops": m.flops,
            "latency": m.latency,
            "latency_ratio": m.latency_ratio,
        }
    return found


def show(name: str, rows: dict[str, dict[str, Any]]) -> None:
    """All that was measured, a line a model."""
    columns = ("quality", "parameters", "bytes", "flops", "latency", "latency_ratio", "seconds", "peak_bytes")
    print(f"\n{name:28}" + "".join(f"{column:>15}" for column in columns))
    for label, row in rows.items():
        cells = (f"{value:15,.4g}" if (value := row.get(column)) is not None else f"{'–':>15}" for column in columns)
        print(f"{label:28}" + "".join(cells), flush=True)


def save(of: Subject, folder: Path) -> None:
    """As a user would; Torch-Pruning leaves a model that no config describes, so its tensors alone."""
    from safetensors.torch import save_model

    try:
        of.model.save_pretrained(folder)
    except Exception:
        folder.mkdir(exist_ok=True)
        save_model(copy.deepcopy(of.model).cpu(), str(folder / "model.safetensors"))


def judged(evidence: Evidence, name: str, rows: dict[str, dict[str, Any]], better: str) -> None:
    """The one thing that a table of peers can claim: what was chosen by data beats what was chosen by size."""
    for what, share in SHARES.items():
        by_size = [rows[f"{by}, {what} {share}"]["quality"] for by in BY_SIZE]
        least = max(by_size) if better == "higher" else min(by_size)
        for slug in ("slicegpt", "optin", "vtrans"):
            row = rows.get(f"{slug}, {what} {share}")
            if row is not None:
                ratio = row["quality"] / least if better == "higher" else least / row["quality"]
                evidence.check(
                    f"{name}: {slug} over the better one by size at {share} of the {what}, ratio of quality",
                    ratio,
                    "> 1",
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("smollm2", "minilm"))
    parser.add_argument("--rows", type=int, default=400, help="test rows of a quality")
    parser.add_argument("--seconds", type=float, default=90.0, help="of timing, all models together")
    parser.add_argument("--base", type=Path, help="a MiniLM fine-tuned on sentiment; by default it is made here")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    wanted = [given.only] if given.only else ["smollm2", "minilm"]
    with Evidence(
        f"peers-compress-{given.only}" if given.only else "peers-compress",
        claim="Structure chosen with data keeps more quality than structure chosen by the size of its weights",
        paper="the cards of slicegpt, optin, vtrans, greenformers; Torch-Pruning (arXiv 2301.12900), Wanda, SparseGPT",
        seeds=(0,),
        folder=given.results,
    ) as evidence:
        evidence.result = {"device": device()}
        for name in wanted:
            if name == "smollm2":
                source = subject("smollm2", "docstrings-lm", dtype=torch.float32)
            elif given.base is not None:
                source = copied(subject(str(given.base), "sentiment"))  # as loaded its weights lie in a mapped file
            else:
                source = treat(subject("minilm", "sentiment"), {"method": "fine-tune", "epochs": 2.0})
            rows = table(source, given.rows, given.seconds)
            show(name, rows)
            evidence.baseline[name] = rows.pop("dense")
            evidence.result[name] = rows
            judged(evidence, name, rows, source.task.better)


if __name__ == "__main__":
    main()
