"""What a method works on: the model of one recipe, its tokenizer, task and teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanformers.errors import LeanError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Budget:
    """An upper limit on the training of one recipe, for cheap estimates.

    examples: training examples used at most. epochs: passes over them at most, in each call of `train`.
    """

    examples: int
    epochs: float = 1.0


@dataclass(kw_only=True)
class Subject:
    """The model that a recipe works on, with all that its methods may use.

    A method may replace `tokenizer` (kept vocabulary) and `model` (a merged adapter). `teacher` holds the
    outputs of the model as it was before the recipe. `budget`, when set, shortens every training: a search
    then runs the very same recipe as a cheap estimate. `callbacks` are called in every training, after its own.
    `notes` is kept beside the measurement.
    """

    model: Any
    tokenizer: Any = None
    task: Any = None
    teacher: Any = None
    device: Any = None
    seed: int = 0
    progress: bool = False
    budget: Budget | None = None
    output_dir: Path | None = None
    callbacks: tuple[Any, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    trained_examples: int = 0
    trained_seconds: float = 0.0
    full_examples: int = 0

    @property
    def anatomy(self) -> Any:
        """The map of the model as it is now."""
        from leanformers.anatomy import Anatomy

        return Anatomy.of(self.model)

    def apply(self, edit: Any, **tensors: Any) -> None:
        """Edit the model in place and write the edit into its ledger."""
        from leanformers.surgery import apply

        self.model = apply(self.model, edit, **tensors)

    def calibration(self, samples: int, batch_size: int = 8) -> Iterator[dict[str, Any]]:
        """Batches of `samples` training texts, without labels, on the model's device."""
        task = self._task("calibration texts")
        device = self._device()
        for batch in task.calibration(self.tokenizer, samples, batch_size=batch_size):
            yield _move(batch, device)

    def check_calibration(self, method: str, batches: Iterable[dict[str, Any]], length: int | None = None) -> None:
        """Refuse calibration texts that are shorter together than one sequence of the task, or of `length` tokens.

        Raises:
            LeanError: they are; it names the method.
        """
        if not self.anatomy.is_text:
            return
        rows = seen = 0
        for batch in batches:
            first = next(iter(batch.values()))
            mask = batch.get("attention_mask")
            rows += len(first)
            seen += int(mask.sum()) if mask is not None else first.shape[:2].numel()
        wanted = getattr(self.task, "max_length", 0)
        wanted = wanted if length is None else min(wanted, length)
        if seen < wanted:
            raise LeanError(
                f"method '{method}': its {rows} calibration texts have {seen} tokens together, fewer than one sequence "
                f"of {wanted}: raise samples, or give longer texts."
            )

    def train(
        self,
        epochs: float,
        learning_rate: float,
        *,
        distillation: Any = None,
        batch_size: int = 32,
        limit: int | None = None,
        augment: int = 0,
        soup: int = 1,
        **options: Any,
    ) -> Any:
        """Train the model on the task, within the budget. Returns training's TrainResult, of a soup the last one's.

        distillation: `leanformers.training.Distillation`; it needs the subject's teacher. None trains on the
        task's own loss, or on the teacher where the task has none (an embedder's texts).
        augment: altered copies of each training text (tasks.augment) that the teacher answers as well; an epoch is
        a pass over texts and copies.
        soup: so many trainings from the same weights, each with a seed of its own, whose outcomes are averaged
        (training.soup). Within a budget there is one. To the subject's callbacks they are one long training; if one
        of them has enough, no more are begun.
        options go to `leanformers.training.fit` as they are (warmup, freeze, callbacks …).
        """
        task = self._task("training data")
        if distillation is None and getattr(task, "needs_teacher", False):
            from leanformers.training import Distillation

            distillation = Distillation()
        if distillation is not None and self.teacher is None:
            raise LeanError("distillation needs a teacher: run it in a recipe, or give Subject(teacher=…)")
        if augment and distillation is None:
            raise LeanError("Altered copies of the texts have no labels: train on them by distillation.")
        available = len(task.splits["train"]) * (1 + augment)
        available = available if limit is None else min(limit, available)
        full = min(round(available * epochs), batch_size * (options.get("max_steps") or 10**12))
        self.full_examples += soup * full
        if self.budget is not None:
            epochs = min(epochs, self.budget.epochs)
            limit = min(available, self.budget.examples)
        used = available if limit is None else min(limit, available)
        if epochs <= 0 or used == 0:
            return None
        options |= {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "limit": limit}
        runs = soup if self.budget is None else 1

        def once(run: int, callbacks: Sequence[Any] = self.callbacks) -> Any:
            told = {**options, "callbacks": (*options.get("callbacks", ()), *callbacks)}
            result = self._fit(self.seed + run, distillation, augment, told)
            self.trained_examples += round(used * epochs)
            self.trained_seconds += result.seconds
            return result

        if runs == 1:
            return once(0)
        from leanformers.training.soup import Member, averaged

        def member(run: int) -> Any:
            return once(run, [Member(one, run, runs) for one in self.callbacks])

        results = averaged(self.model, member, runs, cut=lambda result: result.cut)
        if len(results) < runs:
            self.notes["cut"] = {**self.notes.get("cut", {}), "trainings": len(results), "of_trainings": runs}
        return results[-1]

    def _fit(self, seed: int, distillation: Any, augment: int, options: dict[str, Any]) -> Any:
        """One training, in a folder of its own where there is one for trainings."""
        from leanformers.training import fit

        task, teacher = self.task, self.teacher if distillation is not None else None
        if augment:
            from leanformers.tasks.augment import augmented

            task = augmented(task, augment, mask=getattr(self.tokenizer, "mask_token", None), seed=seed)
            assert teacher is not None  # `train` refuses copies without one
            teacher = teacher.on(task)
        folder = None
        if self.output_dir is not None:
            folder = self.output_dir / f"train-{self.notes.get('trainings', 0)}"
        self.notes["trainings"] = self.notes.get("trainings", 0) + 1
        return fit(
            self.model,
            task,
            self.tokenizer,
            seed=seed,
            distillation=distillation,
            teacher=teacher,
            output_dir=folder,
            progress=self.progress,
            **options,
        )

    def evaluate(self, split: str = "validation", limit: int | None = None) -> dict[str, float]:
        """The task's metrics of the model as it is now."""
        import torch

        task, device = self._task("evaluation data"), self._device()
        self.model.eval()

        def predict(batch: dict[str, Any]) -> torch.Tensor:
            with torch.inference_mode():
                return task.forward(self.model, _move(batch, device))

        return task.evaluate(predict, self.tokenizer, split=split, limit=limit)

    def _task(self, what: str) -> Any:
        if self.task is None:
            raise LeanError(f"this method needs {what}: give a task, e.g. task='sentiment' or --data FILE")
        return self.task

    def _device(self) -> Any:
        return self.device if self.device is not None else next(self.model.parameters()).device


def _move(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
