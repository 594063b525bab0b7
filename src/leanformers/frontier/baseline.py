"""The baseline of a search: the model that was given, fine-tuned where it has to be, and measured.

With a limit on the time its training and the rows are cut to what fits: the training is timed on a few steps first, so
that it is known up front what it will take.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanformers import folders
from leanformers.execute import apart, attach_reference, execute, load_model, save_checkpoint, seed_everything
from leanformers.execute import write_provenance as provenance
from leanformers.frontier.clock import LEAST_TEST, TEST, TIMING, TUNED, VALIDATION, Stop, cut, probe
from leanformers.frontier.shelf import free
from leanformers.frontier.space import Steps
from leanformers.methods import Subject

if TYPE_CHECKING:
    from leanformers.frontier.bench import Workbench

BASELINE = "baseline"
SOURCE = "source.json"  # of a baseline that is an export: what it was exported from, measured in torch
ROWS = "rows.json"  # of a baseline whose time was limited: how many validation rows all are compared on
_TUNE = "tune.json"  # of its training while that goes on: what was made of it to fit the time
_WARM = 4  # passes over a batch before it is timed
_OVER = 0.1  # share of the time by which the training may end later than was foreseen


def _loaded(bench: Workbench, tokenizer: Any = None) -> Subject:
    """The model that was given, before anything is done to it."""
    seed_everything(bench.recipe.seed)  # a new head starts from random numbers
    given = bench.given_tokenizer if tokenizer is None else tokenizer
    model, tokenizer = load_model(bench.source, bench.task, given, bench.recipe.dtype, trust_remote_code=bench.trust)
    return bench.subject_of(apart(model, bench.source).to(bench.device), tokenizer)


def make_baseline(bench: Workbench, place: Path) -> None:
    """Train the baseline where it has to be, measure it, and write it into its folder."""
    from leanformers.measure import measure
    from leanformers.tasks import has_new_head

    subject = _loaded(bench)
    tune = bench.tune
    if tune is None:
        tune = [{"method": "fine-tune"}] if has_new_head(subject.model) else []
    if tune:
        bench.check(replace(subject, teacher=subject.model))  # the baseline becomes the teacher
        bench.venue.check((subject.model, subject.tokenizer))
    with folders.whole(place, keep=True) as partial:
        if tune:
            tune = _within_time(bench, tune, subject, partial)
        attach_reference(bench.task, subject.model, subject.tokenizer, copy_model=bool(tune))
        execute(tune, subject, folder=partial / "training")
        attach_reference(bench.task, subject.model, subject.tokenizer, copy_model=False)
        save_checkpoint(partial, subject.model, subject.tokenizer, bench.task)
        for stop in subject.callbacks:
            if stop.early:
                subject.notes["cut"] = {**subject.notes.get("cut", {}), "steps": len(stop.times), "of": stop.total}
                told = f"baseline: its fine-tuning ended at step {len(stop.times)} of {stop.total}: the time was up"
                if "trainings" in subject.notes["cut"]:
                    told += "; {trainings} of {of_trainings} trainings are averaged".format(**subject.notes["cut"])
                bench.say(told)
        cuts = {name: told for name, told in subject.notes.items() if name == "cut"}
        provenance(partial, replace(bench.recipe, steps=tuple(tune)), cuts)
        pair = (subject.model, subject.tokenizer)
        bench.venue.forget(BASELINE)
        ready, files = bench.venue.ready(BASELINE, pair, partial)
        test = _rows(bench, ready, partial)
        slow = {"limit": test, "seconds": _seconds(bench), **bench.timing}
        whole = measure(ready, bench.task, folder=files, **slow)
        part = measure(ready, bench.task, folder=files, limit=bench.validation, split="validation", **bench.quick())
        if bench.venue.exports:
            source = measure(pair, bench.task, folder=partial, baseline=ready, **slow)
            folders.write_json(partial / SOURCE, source.to_json())
        folders.write_json(partial / "validation.json", part.to_json())
        folders.write_json(partial / "measurement.json", whole.to_json())
        shutil.rmtree(partial / "training", ignore_errors=True)


def _within_time(bench: Workbench, tune: Steps, subject: Subject, partial: Path) -> Steps:
    """The baseline's training as the time allows it, timed on a few steps; the subject is as before.

    What it came to is kept, so that a training that is cut off goes on with the same.
    """
    clock, kept = bench.clock, partial / "training" / _TUNE
    if clock.minutes is None:
        if kept.is_file():  # an earlier call had a limit: what it began is shorter than what is wanted now
            shutil.rmtree(kept.parent)
        return tune
    subject.callbacks = (Stop(clock, clock.start + 60 * clock.minutes * (TUNED + _OVER)),)
    if kept.is_file():
        return list(json.loads(kept.read_text()))
    if kept.parent.is_dir():  # an earlier call had none: it goes on, as far as it comes
        return tune
    timed = probe(clock)
    execute(tune, replace(subject, callbacks=(timed,), notes={}, progress=False))
    tokenizer, subject.model = subject.tokenizer, None
    free()
    subject.model = _loaded(bench, tokenizer).model
    left = max(0.0, clock.left(TUNED) or 0.0)
    shorter = cut(tune, timed.seconds, left)
    told = f"baseline: its fine-tuning takes about {timed.seconds:.0f} s"
    if shorter != tune:
        told += f" of which {left:.0f} s fit: cut to epochs {', '.join(str(step['epochs']) for step in shorter)}"
        subject.notes["cut"] = {"seconds": timed.seconds, "allowed": left, "asked": list(tune)}
    bench.say(told)
    kept.parent.mkdir(parents=True, exist_ok=True)
    folders.write_json(kept, shorter)
    return shorter


def _rows(bench: Workbench, ready: Any, partial: Path) -> int | None:
    """How many test rows the baseline is measured on; validation rows and rounds of the timing are set."""
    from leanformers.measure.latency import MIN_ROUNDS

    if bench.clock.minutes is None:
        return bench.test
    each = bench.pace(ready)
    split = {name: len(bench.task.splits[name]) for name in ("validation", "test")}
    bench.validation = bench.clock.rows(bench.validation, split["validation"], VALIDATION, each)
    test = bench.clock.rows(bench.test, split["test"], TEST / (1 + bench.venue.exports), each, LEAST_TEST)
    pass_seconds = max(each * bench.timing["batch_size"], 1e-9)  # one batch; it is timed beside the baseline's
    rounds = int(60 * bench.clock.minutes * TIMING / (2 * pass_seconds)) - _WARM
    if rounds < MIN_ROUNDS:
        bench.timing["rounds"] = max(1, rounds)
    folders.write_json(partial / ROWS, {"validation": bench.validation, "rounds": bench.timing.get("rounds")})
    asked = {"validation": bench.validation or split["validation"], "test": test or split["test"]}
    told = " and ".join(f"{min(rows, split[name]):,} of {split[name]:,} {name} rows" for name, rows in asked.items())
    bench.say(f"baseline: measured on {told}, {1000 * each:.3g} ms each")
    return test


def _seconds(bench: Workbench) -> float:
    """Of the timing, a tenth of what is left at most."""
    left = bench.clock.left()
    return bench.last_seconds if left is None else max(0.2, min(bench.last_seconds, 0.1 * left))
