"""The one training loop: transformers' Trainer with our batches, losses and checkpoints.

Imported by `fit` when it is called, since Trainer takes seconds to import.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from leanformers.errors import LeanError
from leanformers.training.batches import BucketSampler, Collator, Examples, counts, length_of
from leanformers.training.callbacks import Callback
from leanformers.training.errors import TrainingDiverged
from leanformers.training.folder import COMPLETE, LEARNED, restore
from leanformers.training.objective import Objective

# On a GPU reading the loss waits for it; look only now and then.
_GPU_CHECK_STEPS = 10


def arguments(
    given: dict[str, Any], folder: Path, device: torch.device, steps: int, *, world: int
) -> TrainingArguments:
    """Trainer's arguments from those of `fit`."""
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=given["learning_rate"],
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(given["warmup"] * steps),
        weight_decay=given["weight_decay"],
        max_grad_norm=given["clip"],
        optim="adamw_torch_fused" if device.type in ("cpu", "cuda") else "adamw_torch",
        per_device_train_batch_size=given["batch_size"],
        gradient_accumulation_steps=given["accumulation"],
        bf16=given["bf16"],
        seed=given["seed"],
        logging_steps=max(1, steps // 20),
        logging_nan_inf_filter=False,
        save_strategy="no" if given["output_dir"] is None else "steps",
        save_steps=steps + 1,  # by the clock instead, and at the end
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=True if world > 1 else None,
    )
    args._n_gpu = min(1, args.n_gpu)  # one process drives one device
    return args


class LeanTrainer(Trainer):
    """Trainer over an Objective. Its checkpoints hold what training changes, not the model (safetensors)."""

    loss_is_scaled_for_ga = True  # transformers 5.23; 5.17 reads model_accepts_loss_kwargs

    objective: Objective

    def __init__(
        self,
        objective: Objective,
        args: Any,
        features: Sequence[dict[str, Any]],
        tokenizer: Any,
        *,
        causal: bool,
        callbacks: Sequence[Callback],
        checkpoint_seconds: float,
        advance: Callable[..., None],
    ) -> None:
        self.sampler = BucketSampler([length_of(f) for f in features], args.per_device_train_batch_size, args.seed)
        self.collator = Collator(objective.task, tokenizer, args.seed)
        self.objective = objective
        self.causal = causal
        self.tokens, self.slots = 0.0, 0.0  # real tokens, and places in padded batches, of this call
        super().__init__(model=objective, args=args, train_dataset=Examples(features), data_collator=self.collator)
        self.remove_callback(PrinterCallback)  # it prints each log line
        self.model_accepts_loss_kwargs = True
        self.add_callback(_Steps(self, callbacks, checkpoint_seconds, advance))
        self._finite = torch.ones((), dtype=torch.bool, device=args.device)

    # -- batches -------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.sampler,
            collate_fn=self.collator,
            pin_memory=self.args.device.type == "cuda",
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one step, and what its losses divide by over all of them and all processes."""
        samples = []
        for _ in range(num_batches):
            try:
                samples.append(next(epoch_iterator))
            except StopIteration:
                break
        if not samples:
            return samples, None
        total: dict[str, float] = {}
        for batch in samples:
            for name, value in counts(batch, self.objective.task.kind, self.causal).items():
                total[name] = total.get(name, 0.0) + value
            self.slots += batch["input_ids"].numel() if "input_ids" in batch else 0
        self.tokens += total["tokens"]
        if self.args.world_size > 1:
            summed = self.accelerator.reduce(torch.tensor(list(total.values()), device=device), "sum")
            total = dict(zip(total, summed.tolist(), strict=True))
        return samples, total

    # -- optimiser -----------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the groups that the penalty asks for in place of its own choice for them."""
        if self.optimizer is None and self.objective.penalty is not None:
            groups = self.objective.penalty.groups()
            apart = {id(parameter) for group in groups for parameter in group["params"]}
            optimizer = super().create_optimizer(*args, **kwargs)
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in apart]
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
            for group in groups:
                optimizer.add_param_group(group)
        return super().create_optimizer(*args, **kwargs)

    # -- loss ----------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Processes average their gradients, and each loss is already divided by the count over all of them.
        loss = model(inputs, num_items_in_batch) * self.args.world_size
        self._finite = self._finite & torch.isfinite(loss.detach())
        if self.args.device.type == "cpu":
            self.check_finite()
        return (loss, None) if return_outputs else loss

    def check_finite(self) -> None:
        if not bool(self._finite):
            raise TrainingDiverged(
                f"The training loss became NaN or infinite at step {self.state.global_step + 1} of "
                f"{self.state.max_steps}; lower the learning rate, now {self.args.learning_rate:g}, or prune "
                "less at once."
            )

    # -- checkpoints ---------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.detach().cpu().contiguous() for n, t in self.objective.learned().items()}, folder / LEARNED)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                (folder / COMPLETE).touch()
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise LeanError(
                f"The training checkpoint {folder} cannot be written ({error}); free some space or name another folder."
            ) from error
        if self.args.should_save:
            for other in folder.parent.glob("checkpoint-*"):
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(self.objective, Path(resume_from_checkpoint))


class _Steps(TrainerCallback):
    def __init__(
        self, trainer: LeanTrainer, callbacks: Sequence[Callback], checkpoint_seconds: float, advance: Any
    ) -> None:
        self.trainer = trainer
        self.callbacks = callbacks
        self.checkpoint_seconds = checkpoint_seconds
        self.saved = time.monotonic()
        self.advance = advance

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        per_epoch = math.ceil(len(self.trainer.sampler) / (args.gradient_accumulation_steps * args.world_size))
        self.trainer.sampler.epoch = state.global_step // per_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, total = state.global_step, state.max_steps
        if args.device.type != "cpu" and (step % _GPU_CHECK_STEPS == 0 or step == total):
            self.trainer.check_finite()
        for callback in self.callbacks:
            callback.after_step(self.trainer.objective.model, step, total)
        if args.save_strategy == "steps" and time.monotonic() - self.saved >= self.checkpoint_seconds:
            control.should_save = True
            self.saved = time.monotonic()
        last = state.log_history[-1].get("loss") if state.log_history else None
        self.advance(1, note="" if last is None else f"loss {last:.3f}")
