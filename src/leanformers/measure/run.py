"""`measure` one model, `compare` several: quality and cost on the task's own rows, in any runtime."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leanformers.errors import LeanError
from leanformers.measure import cost
from leanformers.measure.batches import Batch, Measurable, RealBatches, real_batches, spread
from leanformers.measure.decode import decode_rates, unpadded
from leanformers.measure.latency import MIN_ROUNDS, SECONDS, Candidate, Timing, time_together, warm_up
from leanformers.measure.measurement import Measurement
from leanformers.measure.memory import peak_memory
from leanformers.runtimes import Prepared, check, device_of, place, prepare

logger = logging.getLogger(__name__)

# Above this many FLOPs (an estimate) one row of each batch is counted and multiplied by the rows.
_COUNT_WHOLE = 2e11


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A model with all that measuring it takes; `folder` is its checkpoint, if it has one."""

    model: Any
    tokenizer: Any
    folder: Path | None
    prepared: Prepared | None

    @property
    def ready(self) -> Prepared:
        """What is run; there is one whenever there is a task."""
        if self.prepared is None:
            raise LeanError("A model is only run with a task: give one.")
        return self.prepared


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
    generate: int = 0,
    folder: str | Path | None = None,
    baseline: Any = None,
) -> Measurement:
    """Measure one model: quality by the task, and cost.

    Args:
        model: a loaded model, a folder, or a name (`leanformers.tasks.load` says which).
        task: a `Task` or the name of one; without it nothing is run but a count of FLOPs, on random ids.
        tokenizer: of a loaded model; found beside the model where it is not given.
        quality: whether to evaluate the task on `split`, on its first `limit` rows.
        latency: whether to time the model and read its peak memory.
        runtime: where it is run; a name of `leanformers.runtimes.available()`.
        batch_size: rows per timed batch. batches: how many of them at most; fewer where one takes long.
        seconds: time budget of the timing, warm-up aside; at least five rounds are made whatever they take.
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
    generate: int = 0,
    folders: Mapping[str, str | Path] | None = None,
) -> dict[str, Measurement]:
    """Measure several models on the same rows, timed interleaved; the first is `latency_ratio`'s baseline.

    Args:
        models: name -> (model, tokenizer), a loaded model, a `Prepared`, a folder or a name.
        runtime: one for all, or name -> runtime (a model may stand there several times, under several names).
        folders: name -> checkpoint folder, so that bytes are those of the files.
        The rest is as in `measure`; `seconds` is for all of them together.
    """
    if not models:
        raise LeanError("There is no model to compare: give at least one.")
    runtimes = {name: runtime if isinstance(runtime, str) else runtime.get(name, "torch") for name in models}
    return _measure(
        models,
        task,
        wanted=list(models),
        quality=quality,
        latency=latency,
        runtimes=runtimes,
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        split=split,
        seconds=seconds,
        batches=batches,
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
    generate: int,
    folders: Mapping[str, str | Path],
) -> dict[str, Measurement]:
    if batch_size < 1 or batches < 1:
        raise LeanError(f"batch_size is {batch_size} and batches {batches}: give at least 1 of each.")
    for name in set(runtimes.values()):
        check(name)  # before anything long
    if isinstance(task, str | Path):
        from leanformers.tasks import task as find_task

        task = find_task(task)
    subjects = {
        name: _subject(source, task, runtimes.get(name, "torch"), folders.get(name)) for name, source in models.items()
    }
    results = {name: _static(subjects[name]) for name in wanted}
    if task is None:
        for name in wanted:
            results[name] |= _flops_without_task(subjects[name].model, seed)
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
            metrics = {k: float(v) for k, v in task.evaluate(subject.ready, subject.tokenizer, split, limit).items()}
            results[name] |= {"metrics": metrics, "quality": float(task.quality(metrics))}
            results[name] |= {"metric": task.metric, "better": task.better}
    if latency:
        timings, used = _time(subjects, real, seconds)
        for name in wanted:
            results[name] |= _timing(timings[name], batch_size, paired=len(subjects) > 1)
            results[name]["peak_memory"] = _peak(subjects[name], used[name])
    if generate:
        rates = _decode(subjects, real, wanted, generate, seconds)
        for name, rate in rates.items():
            results[name]["decode"] = rate
    return {name: Measurement(**result) for name, result in results.items()}


def _subject(source: Any, task: Any, runtime: str, folder: str | Path | None) -> _Subject:
    place = Path(folder) if folder is not None else None
    model, tokenizer = source if isinstance(source, tuple) else (source, None)
    if isinstance(model, str | Path):
        from leanformers.tasks import load

        place = place or _folder_of(model)
        model, found = load(model, task)
        tokenizer = tokenizer or found
    prepared = model if isinstance(model, Prepared) else None
    model = prepared.source if prepared is not None else model
    if tokenizer is None and task is not None:
        tokenizer = _tokenizer(model, task)
    if prepared is None and task is not None:
        prepared = prepare(model, task, runtime)
    return _Subject(model=model, tokenizer=tokenizer, folder=place, prepared=prepared)


def _tokenizer(model: Any, task: Any) -> Any:
    from leanformers.tasks import load

    return load(model, task)[1]


def _folder_of(source: str | Path) -> Path | None:
    """The checkpoint that a folder or a packaged name stands for; None for a name of the hub."""
    from leanformers.tasks.checkpoints import MODELS, checkpoint

    if str(source) in MODELS:
        return Path(checkpoint(str(source)))
    path = Path(source).expanduser()
    return path if path.is_dir() else None


def _static(subject: _Subject) -> dict[str, Any]:
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
    return found | {"threads": torch.get_num_threads()}


def flops_per_token(model: Any, task: Measurable, real: RealBatches) -> float:
    """FLOPs of the task's forward per real (unpadded) token of the batches: what padding costs is in it.

    For a large model one row of each batch is counted, at its padded length, and multiplied by its rows.
    """
    estimate = 2 * cost.parameters(model) * sum(real.positions)
    total = 0
    for batch, rows in zip(real.batches, real.examples, strict=True):
        taken, times = (batch, 1) if estimate <= _COUNT_WHOLE else (_rows(batch, 1), rows)
        taken = place(taken, device_of(model))
        total += times * cost.count_flops(_forward(model, task, taken), model).total
    return total / max(1, sum(real.tokens))


def _forward(model: Any, task: Measurable, batch: Batch) -> Callable[[], Any]:
    was_training = model.training

    def call() -> Any:
        model.eval()
        try:
            return task.forward(model, batch)
        finally:
            model.train(was_training)

    return call


def _rows(batch: Batch, count: int) -> Batch:
    return {k: v[:count] if torch.is_tensor(v) and v.dim() else v for k, v in batch.items()}


def _flops_without_task(model: Any, seed: int, length: int = 128) -> dict[str, Any]:
    """FLOPs per token of one unpadded sequence of random ids; nothing where the model takes no ids."""
    config = getattr(model, "config", None)
    vocab = getattr(config, "vocab_size", None)
    if vocab is None or getattr(config, "is_encoder_decoder", False):
        return {}
    positions = getattr(config, "max_position_embeddings", None)
    length = min(length, positions - 2) if isinstance(positions, int) and positions > 2 else length
    ids = torch.randint(0, vocab, (1, length), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}
    try:
        count = cost.count_flops(lambda: model(**batch), model).total
    except Exception as error:  # a model of another kind of input
        logger.info("FLOPs were not counted: %s", error)
        return {}
    return {"flops": count / length, "padding": 0.0, "examples": 1, "tokens": length}


def _time(
    subjects: Mapping[str, _Subject], real: Mapping[str, RealBatches], seconds: float
) -> tuple[dict[str, Timing], dict[str, RealBatches]]:
    """Timings of all, and the batches that they were timed on: fewer where a round would take too long."""
    counts = {len(r.batches) for r in real.values()}
    used = dict(real)
    if len(counts) == 1 and (total := counts.pop()) > 1:
        middle = {name: r.keep(spread(total, 1)) for name, r in real.items()}
        once = sum(warm_up(_candidates(subjects, middle)).values())
        allowed = int(seconds / (MIN_ROUNDS * max(once, 1e-9)))
        used = {name: r.keep(spread(total, allowed)) for name, r in real.items()}
    return time_together(_candidates(subjects, used), seconds=seconds), used


def _candidates(subjects: Mapping[str, _Subject], real: Mapping[str, RealBatches]) -> dict[str, Candidate]:
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


def _peak(subject: _Subject, used: RealBatches) -> int | None:
    prepared = subject.ready
    placed = [prepared.place(batch) for batch in used.batches]

    def run() -> None:
        for batch in placed:
            prepared(batch)

    return peak_memory(run, subject.model, prepared.device)


def _decode(
    subjects: Mapping[str, _Subject],
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
