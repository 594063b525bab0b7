"""Train a model on a task, from labels or from a teacher: the one path that every method uses.

AdamW, linear decay with warm-up, batches of like length, gradients clipped at norm 1. The same seed gives the
same weights bit for bit on a CPU with the same number of threads, also when it was killed and resumed.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leanformers.errors import Enough, LeanError
from leanformers.training import folder, state
from leanformers.training.callbacks import Callback, Penalty
from leanformers.training.capture import fingerprint, plain
from leanformers.training.distillation import Distillation
from leanformers.training.errors import TrainingDiverged
from leanformers.training.objective import Objective
from leanformers.training.pairing import pair
from leanformers.training.progress import bar
from leanformers.training.teacher import Teacher

# Arguments that decide the weights: a folder holds one training.
_IDENTITY = (
    "epochs",
    "max_steps",
    "learning_rate",
    "batch_size",
    "accumulation",
    "weight_decay",
    "warmup",
    "clip",
    "dropout",
    "bf16",
    "seed",
    "split",
    "limit",
)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training came to.

    loss: mean over about the last twentieth of the steps (nats, or the task's unit).
    seconds: of this call, the teacher's outputs not counted. steps: optimiser steps of the whole training.
    tokens: real tokens seen in this call. padding: share of the places in its batches that were padding.
    cut: whether a callback had enough of it before its end.
    """

    loss: float
    seconds: float
    steps: int
    tokens: int = 0
    padding: float = 0.0
    cut: bool = False


def fit(
    model: Any,
    task: Any,
    tokenizer: Any,
    *,
    epochs: float = 1.0,
    max_steps: int | None = None,
    learning_rate: float = 5e-5,
    batch_size: int = 32,
    accumulation: int = 1,
    weight_decay: float = 0.01,
    warmup: float = 0.06,
    clip: float = 1.0,
    dropout: float | None = 0.0,
    freeze: Sequence[str] = (),
    bf16: bool | None = None,
    seed: int = 0,
    split: str = "train",
    limit: int | None = None,
    distillation: Distillation | None = None,
    teacher: Teacher | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    callbacks: Sequence[Callback] = (),
    penalty: Penalty | None = None,
    progress: Any = True,
) -> TrainResult:
    """Train `model` in place, on the device where it is; it comes back in eval mode.

    Args:
        epochs: passes over the data, fractions allowed. max_steps: at most this many optimiser steps.
        batch_size: examples per forward pass (and process); accumulation: forward passes per optimiser step.
        weight_decay: not of biases and norms. warmup: share of the steps. clip: largest gradient norm.
        dropout: probability to train with; None for the model's own, for long trainings and from scratch.
        freeze: what is not trained: "embeddings" (the token table; tied heads with it), paths of modules, or "all"
            of the model where a penalty has parameters to train.
        bf16: compute in bfloat16 (True: on CUDA only). None: on CUDA where the weights are in half precision, and
            anywhere where some of those are frozen, as these stay as they are. Half-precision weights that train do
            so in float32 and are cast back: the model keeps its dtype.
        limit: the first so many rows of the split.
        distillation, teacher: see Distillation; a teacher alone takes the defaults of the task's kind.
        output_dir: for checkpoints; a killed training goes on from the last one when called again with the
            same arguments, and a finished one is loaded. None leaves no files behind.
        checkpoint_seconds: between two checkpoints.
        callbacks: objects with after_step(model, step, total); one that raises `Enough` ends the training there.
        penalty: a term of the loss with parameters that train beside the model's; see Penalty.
        progress: False, True, or a running rich.progress.Progress to add a line to.

    Raises:
        LeanError: settings that do not fit each other, the model or the task; a folder with another training.
        TrainingDiverged: the loss or a weight became NaN or infinite.
        KeyboardInterrupt: Ctrl-C; the model is left usable, as the last step made it.
    """
    given = dict(locals())
    _check(given)
    features = task.features(tokenizer, split, limit)
    if not features:
        raise LeanError(f"Task {task.name} has no examples in its split {split!r} to train on.")
    if teacher is not None:
        distillation = (distillation or Distillation()).resolved(task.kind)

    with contextlib.ExitStack() as stack:
        stack.enter_context(state.kept_randomness())
        stack.callback(model.eval)
        if penalty is not None:
            stack.callback(penalty.eval)
        stack.enter_context(state.frozen(model, freeze, penalty))  # a model that is frozen whole keeps its precision
        given["bf16"] = stack.enter_context(state.master_weights(model, bf16))
        stack.enter_context(state.dropout(model, dropout))
        stack.enter_context(state.without_cache(plain(model)))
        objective = pair(
            model, task, tokenizer, distillation, teacher, split=split, limit=limit, seed=seed, penalty=penalty
        )
        if teacher is not None:
            teacher.prepare(split, limit, progress=progress)
        place = folder.opened(output_dir, stack)
        if output_dir is not None:
            identity = {name: given[name] for name in _IDENTITY} | {
                "freeze": list(freeze),
                "distillation": None if distillation is None else asdict(distillation),
                "task": task.fingerprint,
                "teacher": None if teacher is None else teacher.fingerprint,
                "model": fingerprint(model),
            }
            if penalty is not None:
                identity["penalty"] = fingerprint(penalty)
            folder.identify(place, identity)
        return _run(objective, features, given, place)


def _run(objective: Objective, features: Sequence[Any], given: dict[str, Any], place: Path) -> TrainResult:
    from transformers.trainer_callback import TrainerState

    from leanformers.training.trainer import LeanTrainer, arguments

    start = time.perf_counter()
    resumable = given["output_dir"] is not None
    world = max(1, int(os.environ.get("WORLD_SIZE", "1")))  # under torchrun
    per_epoch = math.ceil(len(features) / (given["batch_size"] * world))
    steps = math.ceil(given["epochs"] * math.ceil(per_epoch / given["accumulation"]))
    if given["max_steps"] is not None:
        steps = min(steps, given["max_steps"])

    checkpoint = folder.newest_checkpoint(place) if resumable else None
    done = 0
    if checkpoint is not None:
        saved = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        done = saved.global_step
        if done >= steps:
            folder.restore(objective, checkpoint)
            return TrainResult(loss=_last_loss(saved), seconds=time.perf_counter() - start, steps=done)

    device = next(objective.model.parameters()).device
    args = arguments(given, place, device, steps, world=world)
    with bar(given["progress"], "Training", steps, done) as advance:
        trainer = LeanTrainer(
            objective,
            args,
            features,
            given["tokenizer"],
            causal=objective.distillation is not None and objective.distillation.causal,
            callbacks=[*([given["penalty"]] if given["penalty"] is not None else []), *given["callbacks"]],
            checkpoint_seconds=given["checkpoint_seconds"],
            advance=advance,
        )
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except Enough:
            resumable = False  # there is no checkpoint of where it ended
        finally:
            objective.zero_grad(set_to_none=True)
    if not state.finite(objective):
        raise TrainingDiverged("A weight became NaN or infinite in the last step; lower the learning rate.")
    if resumable:
        folder.finish(place)
    return TrainResult(
        loss=_last_loss(trainer.state),
        seconds=time.perf_counter() - start,
        steps=trainer.state.global_step,
        tokens=round(trainer.tokens),
        padding=1 - trainer.tokens / trainer.slots if trainer.slots and trainer.tokens else 0.0,
        cut=trainer.state.global_step < steps,
    )


def _check(given: dict[str, Any]) -> None:
    for name in ("epochs", "learning_rate"):
        if not given[name] > 0 or not math.isfinite(given[name]):
            raise LeanError(f"fit: {name} is above 0, not {given[name]}.")
    for name in ("batch_size", "accumulation", "max_steps", "limit"):
        if given[name] is not None and given[name] < 1:
            raise LeanError(f"fit: {name} is at least 1, not {given[name]}.")
    for name in ("warmup", "dropout"):
        if given[name] is not None and not 0 <= given[name] < 1:
            raise LeanError(f"fit: {name} is a share from 0 to below 1, not {given[name]}.")
    for name in ("weight_decay", "clip", "checkpoint_seconds"):
        if given[name] < 0:
            raise LeanError(f"fit: {name} is at least 0, not {given[name]}.")
    if given["distillation"] is not None and given["teacher"] is None:
        raise LeanError("fit: distillation needs a teacher; pass teacher=Teacher(model, task, tokenizer).")
    if isinstance(given["freeze"], str):
        raise LeanError(f"fit: freeze is a sequence such as ({given['freeze']!r},), not a string.")
    if given["bf16"] and next(given["model"].parameters()).device.type != "cuda":
        raise LeanError("fit: bf16 is for CUDA; on a CPU train in float32.")


def _last_loss(trainer_state: Any) -> float:
    for entry in reversed(trainer_state.log_history):
        if "loss" in entry:
            return float(entry["loss"])
    return float("nan")
