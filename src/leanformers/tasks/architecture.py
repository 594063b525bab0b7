"""Which architectures suit which kind of task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import LeanError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .base import Task

AUTO = {  # task kind -> Auto class
    "text-classification": "AutoModelForSequenceClassification",
    "text-regression": "AutoModelForSequenceClassification",
    "embedding": "AutoModel",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
}
# These number their positions from padding_idx + 1, so two places of the table are never used.
_OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet", "xmod", "longformer", "ibert")


def check_architecture(config: PretrainedConfig, task: Task, name: str) -> None:
    """Refuse an architecture that the task cannot use.

    Raises:
        LeanError: says which architecture would do.
    """
    from transformers.models.auto import modeling_auto as auto

    kind, family = task.kind, config.model_type
    causal = family in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = family in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    remote = bool(getattr(config, "auto_map", None))
    if kind in ("causal-lm", "masked-lm") and getattr(config, "is_encoder_decoder", False):
        raise LeanError(f"{name} ({family}) is an encoder-decoder, and task {task.name} is {kind}: choose a decoder.")
    if kind == "causal-lm" and (masked or not causal) and not remote:
        raise LeanError(
            f"{name} ({family}) is an encoder, which cannot do the language-modelling task {task.name} "
            "(causal-lm): choose a decoder such as smollm2, or a masked-lm task."
        )
    if kind == "masked-lm" and not masked and not remote:
        raise LeanError(
            f"{name} ({family}) is no masked language model, which task {task.name} (masked-lm) needs: "
            "choose an encoder such as BERT, or a causal-lm task."
        )
    if kind.startswith("text-") and family not in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES and not remote:
        raise LeanError(f"{name} ({family}) has no classification head in transformers, which task {task.name} needs.")
    longest = _positions(config)
    if longest is not None and task.max_length > longest:
        raise LeanError(
            f"Task {task.name} has max_length {task.max_length}, and {name} ({family}) reads at most "
            f"{longest} tokens: pass max_length={longest}."
        )


def _positions(config: PretrainedConfig) -> int | None:
    """The longest input in tokens, None where the config does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    return positions - 2 if config.model_type in _OFFSET else positions
