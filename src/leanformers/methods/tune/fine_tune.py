"""Fine-tuning of the whole model on the task: what makes a baseline of a model whose head is new.

No paper: plain training by the task's own loss. In a recipe it comes first, and the model that it leaves is
the teacher of later steps. ``soup`` averages several trainings (Wortsman et al., 2022, arXiv 2203.05482), which costs
nothing to whoever runs the model. Cost: three forward passes' worth of FLOPs per token and epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

from leanformers.methods.base import Subject, method, setting


@method("fine-tune", stage="prepare", needs=("labels",), trains=True)
@dataclass(frozen=True, kw_only=True)
class FineTune:
    """Fine-tune the whole model on the task."""

    epochs: float = setting(2.0, low=0.0, help="passes over the training data")
    learning_rate: float = setting(1e-4, low=0.0, high=1.0, help="peak, after the warm-up")
    batch_size: int = setting(32, low=1, help="examples per step")
    soup: int = setting(1, low=1, help="trainings from the same start, each with a seed of its own, averaged")

    def __call__(self, subject: Subject) -> None:
        subject.train(self.epochs, self.learning_rate, batch_size=self.batch_size, soup=self.soup)
