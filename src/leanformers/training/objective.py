"""The loss of one batch, as the module that Trainer trains: the student and what is learned beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leanformers.training.batches import INDEX, counted_labels
from leanformers.training.callbacks import Penalty
from leanformers.training.capture import recording
from leanformers.training.distillation import TOKEN_KINDS, DistillationLoss
from leanformers.training.teacher import Teacher


class Objective(nn.Module):
    """alpha * teacher + (1 - alpha) * labels + inner losses; labels alone without a teacher; plus the penalty.

    It wraps the student, so that Trainer meets neither a bare encoder, which it refuses, nor a quantised
    model, and so that a learned projection is trained beside the student and never saved with it.
    """

    def __init__(
        self,
        model: Any,
        task: Any,
        *,
        distillation: DistillationLoss | None = None,
        teacher: Teacher | None = None,
        token_map: Tensor | None = None,
        split: str = "train",
        limit: int | None = None,
        penalty: Penalty | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.penalty = penalty
        self.task = task
        self.distillation = distillation
        self.teacher = teacher
        self.token_map = token_map
        self.split, self.limit = split, limit

    def forward(self, batch: dict[str, Any], counts: dict[str, float]) -> Tensor:
        """Scalar loss of a micro-batch, divided by `counts` of the whole accumulated batch."""
        settings = self.distillation.settings if self.distillation is not None else None
        hidden = settings is not None and settings.hidden > 0
        attention = settings is not None and settings.attentive
        with recording(self.model, hidden=hidden, attention=attention) as record:
            outputs = self.task.forward(self.model, batch)
        loss = None
        hard = 1.0
        if settings is not None:
            assert self.teacher is not None and self.distillation is not None and settings.alpha is not None
            hard = 1 - settings.alpha
            # A live pass is needed for inner states; its outputs then serve for the output loss as well.
            seen, target = None, None
            if settings.inner or not self.teacher.stored:
                target, seen = self.teacher.live(batch, token_map=self.token_map, hidden=hidden, attention=attention)
            elif settings.alpha:
                length = batch["input_ids"].shape[1] if "input_ids" in batch else None
                target = self.teacher.outputs(
                    batch[INDEX], self.split, self.limit, length=length, device=outputs.device
                )
            student = outputs
            if self.token_map is not None and self.task.kind in TOKEN_KINDS:
                student = outputs[..., : len(self.token_map)]  # rows of the vocabulary that are padding
            if isinstance(target, Tensor):
                target = target.to(outputs.device)
            loss = self.distillation(student, target, batch, counts, record, seen)
        if hard:
            term = self._label_loss(outputs, batch, counts)
            loss = hard * term if loss is None else loss + hard * term
        assert loss is not None
        if self.penalty is not None:  # its micro-batches' shares make one
            loss = loss + self.penalty().to(loss.device) * (len(batch[INDEX]) / counts["rows"])
        return loss

    def _label_loss(self, outputs: Tensor, batch: dict[str, Any], counts: dict[str, float]) -> Tensor:
        if "labels" in batch:
            here = len(batch[INDEX])
            if self.task.kind != "embedding":
                here = int(counted_labels(batch["labels"], self.task.kind).sum())
            if here == 0:  # the mean over nothing is NaN
                return outputs.sum() * 0.0
            return self.task.loss(outputs, batch) * (here / counts["labels"])
        if self.distillation is not None:  # unlabelled text: only the teacher speaks
            return outputs.sum() * 0.0
        return self.task.loss(outputs, batch)  # says that there are no labels

    def learned(self) -> dict[str, Tensor]:
        """What training changes, by name: trainable parameters, and buffers that a checkpoint keeps."""
        trainable = {name: p for name, p in self.named_parameters() if p.requires_grad}
        saved = self.state_dict(keep_vars=True).keys()
        return trainable | {name: b for name, b in self.named_buffers() if name in saved}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> bool:
        """Copy what `learned` gave back in place; False if names or shapes are not those of this model."""
        mine = self.learned()
        if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in tensors.items()}:
            return False
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)
        return True
