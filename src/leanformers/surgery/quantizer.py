"""The plug-in that replays the ledger inside ``from_pretrained``.

transformers calls it at three points: before the files are looked up (the config gets the fields of the
skeleton, and the file name that stops a load without leanformers is taken out), after the skeleton is built
(the edits are replayed on it, without weights), and once the weights are in (what is missing or left over is an
error).
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer

import leanformers.surgery.edits  # noqa: F401  (fills the registry that from_json reads)
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.surgery.config import restore
from leanformers.surgery.edit import Edit, from_json
from leanformers.surgery.lean_config import LeanConfig


class LeanQuantizer(HfQuantizer):
    """Replays a ledger. It quantises nothing by itself."""

    requires_calibration = False
    quantization_config: LeanConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if isinstance(quantization_config, dict):
            quantization_config = LeanConfig.from_dict(quantization_config)
        super().__init__(quantization_config, **kwargs)
        self._edits = [from_json(record) for record in quantization_config.edits]
        self._final: dict[str, Any] = {}

    def _before_files(self, config: Any) -> Any:
        config.transformers_weights = None
        self._final = restore(config, self.quantization_config.skeleton)
        return config

    # transformers 5.23 calls the one, 5.17 the other: the hook that sees the config before the files.
    def update_attn_implementation(self, config: Any) -> Any:
        return self._before_files(config)

    def update_tp_plan(self, config: Any) -> Any:
        return self._before_files(config)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        from leanformers.parts.quantised import Int8Rows
        from leanformers.surgery.saving import check_files, wrap_saving

        record = self.quantization_config
        check_files(checkpoint_files, record)
        # The edits of a loaded model work on a copy, so that replaying does not write the ledger twice.
        kept = []
        for edit in self._edits:
            anatomy = Anatomy.of(model)
            if not _of_another_stack(edit, anatomy):
                edit.apply(anatomy)
                kept.append(edit.to_json())
        restore(model.config, self._final)
        replayed = copy.deepcopy(record)
        replayed.edits = kept
        replayed.files = {}
        model.config.quantization_config = replayed
        self.quantization_config = replayed
        scales = {f"{name}.scale" for name, module in model.named_modules() if isinstance(module, Int8Rows)}
        if scales:
            keep = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
            model._keep_in_fp32_modules_strict = keep | scales
        wrap_saving(model)
        model._adjust_missing_and_unexpected_keys = MethodType(_strict, model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model.__dict__.pop("_adjust_missing_and_unexpected_keys", None)
        padding = getattr(model.config, "pad_token_id", None)
        table = Anatomy.of(model).embeddings
        if isinstance(table, torch.nn.Embedding) and table.padding_idx is not None and padding is not None:
            table.padding_idx = padding
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _of_another_stack(edit: Edit, anatomy: Anatomy) -> bool:
    """Whether an edit lies in a decoder that this class of the model, an encoder alone, does not have."""
    stack = getattr(edit, "stack", "") or getattr(edit, "path", "").partition(".")[0]
    absent = {paths.name for paths in anatomy.family.stacks} - set(anatomy.stacks)
    return bool(anatomy.stacks) and stack in absent


def _strict(model: Any, loading_info: Any) -> None:
    """transformers' own clean-up of the loading report, then: anything amiss inside the model is an error.

    What belongs to a head or a pooler may differ, as with any checkpoint of a family.
    """
    type(model)._adjust_missing_and_unexpected_keys(model, loading_info)
    record = model.config.quantization_config
    if record.base:
        from leanformers.surgery.delta import fill

        fill(model, loading_info.missing_keys, record.base)
    anatomy = Anatomy.of(model)
    inside = anatomy.trunk
    missing = sorted(k for k in loading_info.missing_keys if k.startswith(inside))
    unexpected = sorted(k for k in loading_info.unexpected_keys if k.startswith(inside))
    mismatched = sorted(str(k[0] if isinstance(k, tuple) else k) for k in loading_info.mismatched_keys)
    mismatched = [k for k in mismatched if k.startswith(inside)]
    for what, names in (
        ("lacks", missing),
        ("has the unknown", unexpected),
        ("has another shape of", mismatched),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise LeanError(
                f"The checkpoint {what} tensor {names[0]}{more}, so it does not fit its own ledger: "
                "fetch or write it again."
            )
