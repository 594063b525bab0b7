"""LoRA: train low-rank additions to frozen linears, then merge them, so that nothing is left to pay for.

Source: Hu et al. (2021, arXiv 2106.09685), through peft. The merged result is the same architecture: a stock model
stays stock. Deviations: none; defaults are the paper's (query and value, rank 8), scaling alpha / rank.
Cost: while training, rank * (in + out) weights per adapted linear with their optimiser state; afterwards none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from leanformers.anatomy import Anatomy, is_conv1d, is_dense
from leanformers.errors import LeanError
from leanformers.methods.base import Subject, method, setting
from leanformers.parts import LowRankLinear


@method("lora", stage="recover", order=10, trains=True, needs=("labels",), paper="Hu et al. (2021)")
@dataclass(frozen=True, kw_only=True)
class Lora:
    """Tune with low-rank adapters, merged at the end."""

    rank: int = setting(8, low=1, help="of the additions")
    alpha: float = setting(16.0, low=0.0, help="the additions are scaled by alpha / rank")
    dropout: float = setting(0.0, low=0.0, high=0.99, help="on the adapters' input")
    roles: tuple[str, ...] = setting(("query", "value"), help="which linears are adapted")
    epochs: float = setting(2.0, low=0.0, help="passes over the training data")
    learning_rate: float = setting(5e-4, low=0.0, help="peak of the linear schedule")
    batch_size: int = setting(32, low=1, help="examples per step")
    distil: bool = setting(False, help="learn the teacher's outputs instead of the labels alone")

    def __call__(self, subject: Subject) -> None:
        import peft

        anatomy = subject.anatomy
        targets = [anatomy.prefix + path for path in self._paths(anatomy)]
        if not targets:
            raise LeanError("method 'lora': no linear with these roles can be adapted; check roles.")
        if self.distil and subject.teacher is None:
            raise LeanError("method 'lora' with distil needs a teacher; run it in a recipe with a task.")
        heads = fresh_heads(anatomy)
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=targets,
            fan_in_fan_out=any(is_conv1d(subject.model.get_submodule(path)) for path in targets),
        )
        trainable = {name for name, p in subject.model.named_parameters() if p.requires_grad}
        wrapped = peft.inject_adapter_in_model(config, subject.model)
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_("lora_" in name or name.split(".")[0] in heads)
        subject.notes["trainable"] = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        try:
            subject.train(
                self.epochs, self.learning_rate, batch_size=self.batch_size, distillation=self._distillation()
            )
        finally:
            merge(subject.model)
            for name, parameter in subject.model.named_parameters():
                parameter.requires_grad_(name in trainable)

    def _distillation(self) -> Any:
        if not self.distil:
            return None
        from leanformers.training import Distillation

        return Distillation()

    def _paths(self, anatomy: Anatomy) -> list[str]:
        paths = []
        for path in anatomy.paths(self.roles):
            module = anatomy.module(path)
            if isinstance(module, LowRankLinear):
                paths.append(f"{path}.up")
            elif is_dense(module):
                paths.append(path)
        return paths

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return []


def fresh_heads(anatomy: Anatomy) -> list[str]:
    """Names of the task's own heads, which are trained whole; a language-model head is part of the model."""
    return (
        [
            name
            for name, module in anatomy.model.named_children()
            if module is not anatomy.base and not any(part is anatomy.head for part in module.modules())
        ]
        if anatomy.base is not anatomy.model
        else []
    )


def merge(model: nn.Module) -> None:
    """Add every adapter to its linear and put the linear back, in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent) if parent else model, leaf, module.get_base_layer())
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in model.__dict__:
            delattr(model, name)
