"""AxFormer on a small ViT of digits that was trained on 150 images, so that it generalises badly: no retraining.

K = 5 of 17 tokens, groups of 32 of 256 neurons, N = half of 500 validation images; test images are looked at once, at
the end. Control 1 is the rule of the mean loss alone, with everything looked into; control 2 removes heads and groups
at random down to the same FLOPs, three draws for each seed. Two models trained on all 3,500 images are the case
where little is to be gained.
"""

from __future__ import annotations

import random
import statistics
from typing import Any

from claim import Evidence
from common import copied, mean, treat
from digits import trained
from leanformers.methods import Subject
from leanformers.methods.switches import Switches

SEEDS, WELL_TRAINED, DRAWS = (0, 1, 2, 3, 4), (0, 1), 3
TOKENS = 17
GROUP = 32
STEP = {"method": "axformer", "k": 5, "neuron_group": GROUP}
LOOSE = {**STEP, "agreement": 0.0, "factor": 1e6}  # control 1


def flops(subject: Subject) -> int:
    return int(subject.anatomy.flops(TOKENS))


def scores(subject: Subject, dense: Subject) -> dict[str, Any]:
    """Test loss and accuracy, share of the FLOPs, and what the search says of itself."""
    found = subject.evaluate("test")
    notes = subject.notes.get("axformer", {})
    kinds = [entry["what"] for entry in notes.get("accepted", [])]
    return {
        "test_loss": found["loss"],
        "accuracy": found["accuracy"],
        "flops_kept": flops(subject) / flops(dense),
        **{name: notes[name] for name in ("loss_before", "loss_after", "passes") if name in notes},
        "accepted": {kind: kinds.count(kind) for kind in ("hard", "gone", "members")} if notes else {},
    }


def at_random(dense: Subject, target: float, seed: int) -> Subject:
    """Heads and groups of neurons removed in a random order until no more FLOPs stay than that share."""
    result = copied(dense)
    switches = Switches(result.anatomy)
    units = []
    for layer in switches.layers:
        for name, switch in layer.items():
            size = 1 if name == "attention" else GROUP
            units += [(switch, set(range(at, at + size))) for at in range(0, switch.size, size)]
    random.Random(seed).shuffle(units)
    whole = float(flops(dense))
    left = whole
    for switch, members in units:
        if left <= target * whole:
            break
        alone = len(switch.members) + len(members) == switch.size
        if alone and switches.standing == 1:
            continue
        switch.members, switch.gone = switch.members | members, alone
        left -= saved(dense, switch, len(members))
    switches.apply(result)
    return result


def saved(dense: Subject, switch: Any, count: int) -> float:
    """FLOPs of some members."""
    part, hidden = switch.part, dense.anatomy.hidden_size
    if hasattr(part, "head_dim"):
        return count * part.head_dim * (8 * TOKENS * hidden + 4 * TOKENS**2)
    return count * 4 * TOKENS * hidden


def run(seed: int, train: int | None) -> dict[str, Any]:
    """All scores of one seed."""
    dense = trained(seed=seed, train=train)
    both, loose = treat(dense, STEP), treat(dense, LOOSE)
    found = {"dense": scores(dense, dense), "axformer": scores(both, dense), "mean loss alone": scores(loose, dense)}
    drawn = [scores(at_random(dense, found["axformer"]["flops_kept"], 100 * seed + n), dense) for n in range(DRAWS)]
    names = ("test_loss", "accuracy", "flops_kept")
    found["at random"] = {name: mean(one[name] for one in drawn) for name in names}
    print(seed, train, found, flush=True)
    return found


def average(runs: list[dict[str, Any]], rule: str, name: str) -> float:
    return mean(one[rule][name] for one in runs)


with Evidence(
    "axformer",
    claim="Validation loss falls by removing parts without retraining, held-out accuracy does not drop, FLOPs fall",
    paper="Nagarajan, Sen, Stevens, Raghunathan (2022), AxFormer, arXiv 2010.03688",
    seeds=SEEDS,
) as evidence:
    few = [run(seed, 150) for seed in SEEDS]
    well = [run(seed, None) for seed in WELL_TRAINED]
    evidence.baseline = {
        "dense, 150 images": [one["dense"] for one in few],
        "dense, 3,500": [one["dense"] for one in well],
    }
    evidence.result = {
        rule: {"150 images": [one[rule] for one in few], "3,500 images": [one[rule] for one in well]}
        for rule in ("axformer", "mean loss alone", "at random")
    }
    changes = [one["axformer"]["accuracy"] - one["dense"]["accuracy"] for one in few]
    error = statistics.stdev(changes) / len(changes) ** 0.5
    loss = average(few, "axformer", "test_loss")
    evidence.check("Test loss after over before, mean of 5 seeds", loss / average(few, "dense", "test_loss"), "<= 1")
    evidence.check("Change of test accuracy over its standard error", mean(changes) / max(error, 1e-9), ">= -1")
    evidence.check("Share of the FLOPs that stays", average(few, "axformer", "flops_kept"), "<= 0.95")
    evidence.check("Test loss over that of random removal", loss / average(few, "at random", "test_loss"), "< 1")
    fewer = average(well, "mean loss alone", "flops_kept") - average(well, "axformer", "flops_kept")
    evidence.check("Well trained: FLOPs kept by the mean loss alone, less those by both rules", fewer, "< 0")
    worse = average(well, "mean loss alone", "accuracy") - average(well, "axformer", "accuracy")
    evidence.check("Well trained: accuracy by the mean loss alone, less that by both rules", worse, "< 0")
