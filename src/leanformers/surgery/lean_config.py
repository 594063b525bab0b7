"""The ledger: the ordered list of edits, kept on the model's config.

It poses as the config's ``quantization_config`` with ``quant_method: "leanformers"``, which is how transformers
finds the plug-in (``quantizer.py``) that replays it.
"""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.surgery.edit import Edit, from_json

METHOD = "leanformers"
FORMAT = 1


class LeanConfig(QuantizationConfigMixin):
    """The ledger as transformers sees it.

    ``edits`` are JSON records; ``skeleton`` the config fields as they were before the first edit, from which the
    skeleton is built; ``files`` the SHA-256 of each weight file, written last; ``base`` names the model that a
    delta lies on.
    """

    quant_method: Any = METHOD

    def __init__(
        self,
        edits: list[dict[str, Any]] | None = None,
        skeleton: dict[str, Any] | None = None,
        files: dict[str, str] | None = None,
        base: dict[str, str] | None = None,
        format: int = FORMAT,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if not isinstance(format, int) or format > FORMAT or unknown:
            what = f"format {format}" if not unknown else f"the fields {sorted(unknown)}"
            raise LeanError(f"The ledger was written by a newer leanformers ({what}): upgrade leanformers.")
        self.quant_method = METHOD
        self.format = format
        self.edits = list(edits or [])
        self.skeleton = dict(skeleton or {})
        self.files = dict(files or {})
        self.base = dict(base) if base else None

    def to_dict(self) -> dict[str, Any]:
        record = super().to_dict()
        return {key: value for key, value in record.items() if key != "base" or value}


def ledger_of(config: Any) -> LeanConfig | None:
    """The ledger on a config, None where there is none."""
    record = getattr(config, "quantization_config", None)
    if isinstance(record, dict) and record.get("quant_method") == METHOD:
        return LeanConfig.from_dict(record)
    return record if isinstance(record, LeanConfig) else None


def ensure_ledger(model: Any) -> LeanConfig:
    """The model's ledger; an empty one is put in place, with the plug-in, if there is none.

    Raises:
        LeanError: the model carries another quantisation.
    """
    from leanformers.surgery.quantizer import LeanQuantizer
    from leanformers.surgery.saving import wrap_saving

    record = getattr(model.config, "quantization_config", None)
    if record is None:
        record = LeanConfig()
        model.config.quantization_config = record
    if not isinstance(record, LeanConfig):
        method = record.get("quant_method") if isinstance(record, dict) else getattr(record, "quant_method", record)
        raise LeanError(f"The model is quantised with {method}: load it unquantised, since edits need its weights.")
    if not isinstance(getattr(model, "hf_quantizer", None), LeanQuantizer):
        model.hf_quantizer = LeanQuantizer(record)
        model.is_quantized = True
        model.quantization_method = METHOD
    wrap_saving(model)
    return record


def ledger(model: Any) -> tuple[Edit, ...]:
    """The edits made on a model, in order; empty for a stock model."""
    record = ledger_of(model.config)
    return tuple(from_json(item) for item in record.edits) if record else ()


def apply(model: Any, edit: Edit, **tensors: Any) -> Any:
    """Make one edit in place and write it into the ledger.

    Args:
        model: a loaded transformers model.
        edit: the edit.
        tensors: what the edit needs to decide (``keep``, ``mask``, ``up`` and ``down``).

    Returns:
        The same model.

    Raises:
        LeanError: the edit does not suit the model; then nothing is changed.
    """
    anatomy = Anatomy.of(model)
    edit.cost(anatomy)  # refuses what does not fit before anything is touched
    had = ledger_of(model.config) is not None
    record = ensure_ledger(model)
    try:
        edit.apply(anatomy, **tensors)
    except LeanError:
        if not had and not record.edits:
            _forget(model)
        raise
    record.edits.append(edit.to_json())
    return model


def _forget(model: Any) -> None:
    from leanformers.surgery.saving import unwrap_saving

    del model.config.quantization_config
    del model.hf_quantizer
    model.is_quantized = False
    unwrap_saving(model)
