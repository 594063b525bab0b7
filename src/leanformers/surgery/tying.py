"""Tied weights: which there are, and how to let go of them."""

from __future__ import annotations

from torch import nn


def tied_names(model: nn.Module) -> set[str]:
    """Names of the weights that are tied to the input embeddings, on a loaded model or a skeleton."""
    keys: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    table = model.get_input_embeddings()  # type: ignore[operator]
    own = {f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if module is table}
    tied = set(own)
    for _ in range(3):
        tied |= {k for k, v in keys.items() if v in tied} | {v for k, v in keys.items() if k in tied}
    return tied


def untie(model: nn.Module, source: str) -> None:
    """Forget that any weight is tied to that of the module ``source``, so that nothing ties it again."""
    for module in (model, *model.modules()):
        declared = getattr(module, "_tied_weights_keys", None)
        if isinstance(declared, dict):  # what tie_weights starts from when it is called again
            vars(module)["_tied_weights_keys"] = {k: v for k, v in declared.items() if not k.endswith(".weight")}
        keys = getattr(module, "all_tied_weights_keys", None)
        if keys:
            gone = [k for k, v in keys.items() if k.endswith(".weight") and _ends(source, v)]
            vars(module)["all_tied_weights_keys"] = {k: v for k, v in keys.items() if k not in gone}


def _ends(source: str, name: str) -> bool:
    return f"{source}.weight".endswith(name) or name.endswith(f"{source}.weight")
