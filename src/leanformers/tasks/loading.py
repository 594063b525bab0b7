"""From whatever names a model to (model, tokenizer), with the head that the task needs."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LeanError
from .architecture import AUTO, check_architecture
from .cache import quiet
from .checkpoints import MODELS, checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .base import Task

logger = logging.getLogger(__name__)


def load(
    source: Any,
    task: Task | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in eval mode with its tokenizer.

    Args:
        source: a loaded model, a pair (model, tokenizer), a folder (a sentence-transformers folder too),
            "minilm" or "smollm2", or a hub name.
        task: decides the head; None takes the class that the checkpoint was saved from.
        dtype: None: float32, which trains and is the fast one on most CPUs; "auto": the checkpoint's own.
        trust_remote_code: as in `from_pretrained`; code from a checkpoint never runs without it.
        weights: False gives the structure alone, with its tensors on the meta device, in no memory.

    Raises:
        LeanError: no such model, or one whose architecture the task cannot use.
    """
    if isinstance(source, tuple):
        model, tokenizer = source
        return _checked(model, task), _with_padding(tokenizer, model)
    if hasattr(source, "config") and hasattr(source, "forward"):
        path = getattr(source.config, "_name_or_path", "") or getattr(source, "name_or_path", "")
        if not path:
            raise LeanError("The model does not say where its tokenizer is; pass the pair (model, tokenizer).")
        return _checked(source, task), _with_padding(_tokenizer(path, trust_remote_code), source)

    import torch

    path = _resolve(source)
    config = _config(path, trust_remote_code)
    if task is not None:
        check_architecture(config, task, str(source))
    tokenizer = _tokenizer(path, trust_remote_code)
    wanted: dict[str, Any] = {"dtype": torch.float32 if dtype is None else dtype}
    if trust_remote_code:
        wanted["trust_remote_code"] = True
    if not weights:
        wanted["device_map"] = "meta"
    permutation = None
    if task is not None and task.kind in ("text-classification", "text-regression"):
        head, permutation = _head(config, task)
        wanted |= head
    model, info = _weights(_auto(config, task), path, wanted)
    _check_weights(model, info, task, str(source))
    if permutation is not None:
        _permute_head(model, permutation)
    if task is not None and task.kind == "embedding":
        from .pooling import note_pooling

        note_pooling(model, Path(path))
    return _checked(model, task), _with_padding(tokenizer, model)


def has_new_head(model: PreTrainedModel) -> bool:
    """Whether `load` started the task's head from random numbers: the model needs fine-tuning first."""
    return bool(getattr(model, "_leanformers_new_head", False))


def warn_of_new_head(model: PreTrainedModel, source: Any) -> None:
    """Say that a model's answers are random where `load` had to make up its head."""
    if has_new_head(model):
        logger.warning(
            "%s has no head for this task: it gets a random one, and its quality says nothing. Give a model that was "
            "trained on the task; leanformers slim trains it first.",
            source,
        )


def _resolve(source: Any) -> str:
    if not isinstance(source, str | Path):
        raise LeanError(f"A model is a loaded model, a folder or a name, not a {type(source).__name__}.")
    name = str(source)
    if name in MODELS:
        return str(checkpoint(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        if (path / "0_Transformer" / "config.json").is_file():  # sentence-transformers before 2.0
            return str(path / "0_Transformer")
        raise LeanError(f"{name} is no model: the directory has no config.json; give the folder that was saved.")
    if path.exists():
        raise LeanError(f"{name} is a file; give the folder that holds config.json and the weights.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise LeanError(f"There is no folder {name}; give a folder that holds config.json and the weights.")
    return name


def _sentence(error: BaseException) -> str:
    """The first line of an error of somebody else."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _config(path: str, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        if Path(path).is_dir():
            raise LeanError(f"The config.json of {path} cannot be read ({_sentence(error)}).") from error
        close = difflib.get_close_matches(path, MODELS, 1)
        guess = f" (did you mean {close[0]!r}?)" if close else ""
        raise LeanError(
            f"There is no model {path}{guess}: it is no folder, none of {', '.join(MODELS)}, and the hub did not "
            f"give it ({_sentence(error)})."
        ) from error


def _tokenizer(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise LeanError(
            f"{path} has no tokenizer that can be read ({_sentence(error)}); save one there, or pass the "
            "pair (model, tokenizer)."
        ) from error
    # Where no file of a tokenizer lies, transformers makes one of the config's type that knows no word.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise LeanError(
            f"{path} has no tokenizer, or one without words; save one there, or pass the pair (model, tokenizer)."
        )
    return tokenizer


def _auto(config: PretrainedConfig, task: Task | None) -> Any:
    import transformers

    if task is not None:
        return getattr(transformers, AUTO[task.kind])
    saved = (config.architectures or ["AutoModel"])[0]
    return getattr(transformers, saved, transformers.AutoModel)


def _weights(auto: Any, path: str, wanted: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    from safetensors import SafetensorError

    pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(Path(path).glob(pattern))]
    if pickled and not any(Path(path).glob("*.safetensors")):
        raise LeanError(
            f"{path} holds its weights as a pickle ({pickled[0]}), which can run code: load it with transformers where "
            "you trust it, and give the folder that model.save_pretrained writes."
        )
    try:
        with quiet():  # missing and mismatched tensors are looked at in _check_weights
            return auto.from_pretrained(path, output_loading_info=True, use_safetensors=True, **wanted)
    except LeanError:
        raise
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise LeanError(f"The model in {path} cannot be loaded ({_sentence(error)}).") from error


def _head(config: PretrainedConfig, task: Task) -> tuple[dict[str, Any], list[int] | None]:
    """Arguments that give the head its size, and which of its rows is which label if the order differs."""
    if task.kind == "text-regression":
        return {
            "num_labels": 1,
            "problem_type": "regression",
            "ignore_mismatched_sizes": config.num_labels != 1,
        }, None
    labels = task.labels or []
    names = [str(name) for _, name in sorted((config.id2label or {}).items())]
    permutation = None
    if names != labels and sorted(names) == sorted(labels):
        permutation = [names.index(label) for label in labels]
    head: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }
    if config.num_labels != len(labels):
        head["ignore_mismatched_sizes"] = True
    return head, permutation


def _permute_head(model: PreTrainedModel, permutation: list[int]) -> None:
    """Bring the rows of a trained classification head into the task's order of labels."""
    import torch

    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == len(permutation)][-1]
    with torch.no_grad():
        last.weight.copy_(last.weight[permutation])
        if last.bias is not None:
            last.bias.copy_(last.bias[permutation])


def _check_weights(model: PreTrainedModel, info: dict[str, Any], task: Task | None, name: str) -> None:
    missing = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    prefix = model.base_model_prefix + "."
    is_base = model.base_model is model
    body = [key for key in missing if (is_base or key.startswith(prefix)) and "pooler" not in key]
    if body:
        raise LeanError(
            f"{name} lacks {len(body)} tensors that {type(model).__name__} needs (first: {body[0]}); it "
            "was saved from another architecture or is incomplete."
        )
    head = [key for key in missing if "pooler" not in key]
    if head and task is not None and task.kind in ("causal-lm", "masked-lm"):
        raise LeanError(
            f"{name} has no language-modelling head ({head[0]} is missing), which task {task.name} needs: "
            "choose a checkpoint that was saved with one."
        )
    model._leanformers_new_head = bool(head)  # type: ignore[assignment]
    if head:
        logger.info("%s: the head starts untrained (%s)", name, ", ".join(head))


def _checked(model: PreTrainedModel, task: Task | None) -> PreTrainedModel:
    if task is not None:
        check_architecture(model.config, task, model.config._name_or_path or type(model).__name__)
        labels = len(task.labels or [])
        if task.kind == "text-classification" and model.config.num_labels != labels:
            raise LeanError(
                f"The model's head has {model.config.num_labels} labels and task {task.name} has "
                f"{labels}: load it with the task, or give its folder."
            )
    return model.eval()


def _with_padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Decoders often have no padding token: the end-of-text token serves, since the mask covers it."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise LeanError("The tokenizer has neither a padding nor an end-of-text token; set tokenizer.pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer
