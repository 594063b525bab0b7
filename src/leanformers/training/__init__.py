"""One training path on transformers' Trainer: labels and distillation, shared by every method.

fit(model, task, tokenizer, epochs=2, learning_rate=5e-5)
fit(student, task, tokenizer, epochs=2, teacher=Teacher(model, task, tokenizer), distillation=Distillation())
"""

from leanformers.training.callbacks import Callback, Penalty
from leanformers.training.distillation import Distillation
from leanformers.training.errors import TrainingDiverged
from leanformers.training.fit import TrainResult, fit
from leanformers.training.teacher import Teacher

__all__ = ["Callback", "Distillation", "Penalty", "Teacher", "TrainResult", "TrainingDiverged", "fit"]
