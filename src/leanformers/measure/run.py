"""`measure` one model, `compare` several: quality and cost on the task's own rows, in any runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from leanformers.errors import LeanError
from leanformers.measure import cost
from leanformers.measure.batches import RealBatches, real_batches, spread
from leanformers.measure.decode import decode_rates, unpadded
from leanformers.measure.latency import MIN_ROUNDS, SECONDS, Candidate, Timing, time_together, warm_up
from leanformers.measure.measurement import Measurement
from leanformers.measure.memory import peak_memory
from leanformers.measure.per_token import flops_per_token, flops_without_task
from leanformers.measure.subject import Subject, subject_of
from leanformers.runtimes import check


def measure(
    model: Any,
    task: Any = None,
    tokenizer: Any = None,
    *,
    quality: bool = True,
    latency: bool = True,
    runtime: str = "torch",
    batch_size: int = 16,
    limit: int | None = None,
    seed: int = 0,
    split: str = "test",
    seconds: float = SECONDS,
    batches: int = 8,
    rounds: int = MIN_ROUNDS,
    generate: int = 0,
    folder: str | Path | None = None,
    baseline: Any = None,
) -> Measurement:
    """Measure one model: quality by the task, and cost.

    Args:
        model: a loaded model, a folder, or a name (`leanformers.tasks.load` says which).
        task: a `Task` or the name of one; without it nothing is run but a count of FLOPs, on random ids.
        tokenizer: of a loaded model; found beside the model where it is not given.
        quality: whether to evaluate the task on `split`, on its first `limit` rows; in batches of `batch_size` where
            the runtime's answers depend on what stands in a batch, of the task's own size elsewhere.
        latency: whether to time the model and read its peak memory.
        runtime: where it is run; a name of `leanformers.runtimes.available()`.
        batch_size: rows per timed batch. batches: how many of them at most; fewer where one takes long.
        seconds: time budget of the timing, warm-up aside. rounds: how many are made at least, whatever they take.
        generate: new tokens to write for the decoding rate of a causal language model; 0 leaves it out.
        folder: checkpoint of a loaded model, so that bytes are those of its files.
        baseline: a model, or (model, tokenizer), or either with a `Prepared` for the model, timed in the same
            rounds and measured no further: `latency_ratio` is then the ratio to it.

    Raises:
        LeanError: a runtime that cannot run here, a task without rows, a model that cannot be found.
    """
    models: dict[str, Any] = {}
    if baseline is not None and latency and task is not None:
        models["baseline"] = baseline
    models["model"] = model if tokenizer is None else (model, tokenizer)
    found = _measure(
        models,
        task,
        wanted=["model"],
        quality=quality,
        latency=latency,
        runtimes={"model": runtime},
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        split=split,
        seconds=seconds,
        batches=batches,
        rounds=rounds,
        generate=generate,
        folders={"model": folder} if folder is not None else {},
    )
    return found["model"]


def compare(
    models: Mapping[str, Any],
    task: Any,
    *,
    quality: bool = True,
    latency: bool = True,
    runtime: str | Mapping[str, str] = "torch",
    batch_size: int = 16,
    limit: int | None = None,
    seed: int = 0,
    split: str = "test",
    seconds: float = SECONDS,
    batches: int = 8,
    rounds: int = MIN_ROUNDS,
    generate: int = 0,
    folders: Mapping[str, str | Path] | None = None,
    wanted: Sequence[str] | None = None,
) -> dict[str, Measurement]:
    """Measure several models on the same rows, timed interleaved; the first is `latency_ratio`'s baseline.

    Args:
        models: name -> (model, tokenizer), a loaded model, a `Prepared`, a folder or a name.
        runtime: one for all, or name -> runtime (a model may stand there several times, under several names).
        folders: name -> checkpoint folder, so that bytes are those of the files.
        wanted: names to measure, None for all; the others are timed beside them and no more.
        The rest is as in `measure`; `seconds` is for all of them together.
    """
    if not models:
        raise LeanError("There is no model to compare: give at least one.")
    runtimes = {name: runtime if isinstance(runtime, str) else runtime.get(name, "torch") for name in models}
    return _measure(
        models,
        task,
        wanted=list(models if wanted is None else wanted),
        quality=quality,
        latency=latency,
        runtimes=runtimes,
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        split=split,
        seconds=seconds,
        batches=batches,
        rounds=rounds,
        generate=generate,
        folders=folders or {},
    )


def _measure(
    models: Mapping[str, Any],
    task: Any,
    *,
    wanted: list[str],
    quality: bool,
    latency: bool,
    runtimes: Mapping[str, str],
    batch_size: int,
    limit: int | None,
    seed: int,
    split: str,
    seconds: float,
    batches: int,
    rounds: int,
    generate: int,
    folders: Mapping[str, str | Path],
) -> dict[str, Measurement]:
    if batch_size < 1 or batches < 1 or rounds < 1:
        raise LeanError(f"batch_size is {batch_size}, batches {batches} and rounds {rounds}: give at least 1 of each.")
    for name in set(runtimes.values()):
        check(name)  # before anything long
    if isinstance(task, str | Path):
        from leanformers.tasks import task as find_task

        task = find_task(task)
    subjects = {
        name: subject_of(source, task, runtimes.get(name, "torch"), folders.get(name))
        for name, source in models.items()
    }
    results = {name: _static(subjects[name]) for name in wanted}
    if task is None:
        for name in wanted:
            results[name] |= flops_without_task(subjects[name].model, seed)
        return {name: Measurement(**result) for name, result in results.items()}

    real = real_batches(
        task, {n: s.tokenizer for n, s in subjects.items()}, batch_size=batch_size, count=batches, split=split
    )
    for name in wanted:
        subject = subjects[name]
        results[name] |= {
            "flops": flops_per_token(subject.model, task, real[name]),
            "padding": real[name].padding,
        }
        results[name] |= {"examples": sum(real[name].examples), "tokens": sum(real[name].tokens)}
        if quality:
            size = {"batch_size": batch_size} if subject.ready.by_batch else {}
            metrics = task.evaluate(subject.ready, subject.tokenizer, split, limit, **size)
            metrics = {key: float(value) for key, value in metrics.items()}
            results[name] |= {"metrics": metrics, "quality": float(task.quality(metrics))}
            results[name] |= {"metric": task.metric, "better": task.better}
    if latency:
        timings, used = _time(subjects, real, seconds, rounds)
        for name in wanted:
            results[name] |= _timing(timings[name], batch_size, paired=len(subjects) > 1)
            if subjects[name].ready.name.startswith("torch"):  # what torch allocates says nothing of other runtimes
                results[name]["peak_memory"] = _peak(subjects[name], used[name])
    for name in wanted:
        if (held := subjects[name].ready.held()) is not None:
            results[name]["memory"] = held
    if generate:
        rates = _decode(subjects, real, wanted, generate, seconds)
        for name, rate in rates.items():
            results[name]["decode"] = rate
    return {name: Measurement(**result) for name, result in results.items()}


def _static(subject: Subject) -> dict[str, Any]:
    found: dict[str, Any] = {
        "parameters": cost.parameters(subject.model),
        "memory": cost.bytes_in_memory(subject.model),
    }
    if subject.folder is not None:
        sizes = cost.bytes_on_disk(subject.folder)
        found |= {"bytes": sizes.weights, "tokenizer_bytes": sizes.tokenizer or None}
    else:
        found["bytes"] = cost.bytes_of_state(subject.model)
    if subject.prepared is not None:
        found |= {"runtime": subject.prepared.name, "device": str(subject.prepared.device)}
        found["dtype"] = subject.prepared.details.get("dtype")
        if not subject.prepared.name.startswith("torch"):
            found["memory"] = found["bytes"]  # the torch model behind it is not what is held, until that is known
    return found | {"threads": torch.get_num_threads()}


def _time(
    subjects: Mapping[str, Subject], real: Mapping[str, RealBatches], seconds: float, rounds: int
) -> tuple[dict[str, Timing], dict[str, RealBatches]]:
    """Timings of all, and the batches that they were timed on: fewer where a round would take too long."""
    counts = {len(r.batches) for r in real.values()}
    used = dict(real)
    if len(counts) == 1 and (total := counts.pop()) > 1:
        middle = {name: r.keep(spread(total, 1)) for name, r in real.items()}
        once = sum(warm_up(_candidates(subjects, middle)).values())
        allowed = int(seconds / (rounds * max(once, 1e-9)))
        used = {name: r.keep(spread(total, allowed)) for name, r in real.items()}
    return time_together(_candidates(subjects, used), seconds=seconds, min_rounds=rounds), used


def _candidates(subjects: Mapping[str, Subject], real: Mapping[str, RealBatches]) -> dict[str, Candidate]:
    found = {}
    for name, subject in subjects.items():
        prepared = subject.ready
        placed = [prepared.place(batch) for batch in real[name].batches]
        found[name] = Candidate(call=prepared, batches=placed, tokens=sum(real[name].tokens), device=prepared.device)
    return found


def _timing(timing: Timing, batch_size: int, *, paired: bool) -> dict[str, Any]:
    return {
        "latency": timing.latency,
        "latency_p95": timing.latency_p95,
        "latency_ratio": timing.ratio if paired else None,
        "latency_range": timing.ratio_range if paired else None,
        "throughput": timing.throughput,
        "batch_size": batch_size,
        "rounds": timing.rounds,
    }


def _peak(subject: Subject, used: RealBatches) -> int | None:
    prepared = subject.ready
    placed = [prepared.place(batch) for batch in used.batches]

    def run() -> None:
        for batch in placed:
            prepared(batch)

    return peak_memory(run, subject.model, prepared.device)


def _decode(
    subjects: Mapping[str, Subject],
    real: Mapping[str, RealBatches],
    wanted: list[str],
    new_tokens: int,
    seconds: float,
) -> dict[str, float]:
    """Decoding rates of those subjects that run in plain torch and can generate."""
    writers = {
        name: (subjects[name].model, unpadded(real[name].batches[len(real[name].batches) // 2]))
        for name in wanted
        if subjects[name].prepared is not None
        and subjects[name].prepared.name == "torch"  # type: ignore[union-attr]
        and callable(getattr(subjects[name].model, "can_generate", None))
        and subjects[name].model.can_generate()
    }
    return decode_rates(writers, new_tokens=new_tokens, seconds=seconds) if writers else {}
