"""What a model costs before it is run: parameters, bytes and FLOPs.

FLOPs are torch's own count (`torch.utils.flop_counter`), a multiply-add being 2, of everything that
multiplies matrices; norms, activations and softmax are not counted, and a causal mask earns no discount (the
whole length x length square is counted, under eager attention and SDPA alike). torch's table misses some
kernels, which `FORMULAS` adds: the fused attention of the CPU, integer products of int8 layers, matrix-vector
products. A linear whose kernel is still invisible to the counter (a custom one, a packed one) is counted by
its shape and named in `FlopCount.by_shape`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from leanformers.anatomy import count_parameters
from leanformers.errors import LeanError

Shape = tuple[int, ...]
_aten = torch.ops.aten


def parameters(model: nn.Module) -> int:
    """Number of parameters: tied ones once, a quantised weight by its elements, other buffers not at all."""
    return count_parameters(model)


def bytes_in_memory(model: nn.Module) -> int:
    """Bytes that parameters and all buffers hold in memory, tied ones once."""
    return bytes_of([*model.parameters(), *model.buffers()])


def bytes_of_state(model: nn.Module) -> int:
    """Bytes of the tensors that a checkpoint of `model` stores: its state dict as it is, tied ones once.

    The header of a safetensors file (about 100 bytes per tensor) is not included.
    """
    state = model.state_dict(keep_vars=True).values()
    return bytes_of(v for v in state if isinstance(v, torch.Tensor))


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, those that are the same or show the same memory once."""
    return sum(nbytes(tensor) for tensor in _distinct(tensors))


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; for a wrapper (torchao's quantised weights) the bytes of the tensors inside it."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(nbytes(getattr(tensor, name)) for name in names)
    if tensor.is_sparse or tensor.layout in (torch.sparse_csr, torch.sparse_csc):
        parts = (
            (tensor._indices(), tensor._values())
            if tensor.is_sparse
            else (tensor.crow_indices(), tensor.col_indices(), tensor.values())
            if tensor.layout is torch.sparse_csr
            else (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
        )
        return sum(nbytes(part) for part in parts)
    return tensor.numel() * tensor.element_size()


def _distinct(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Each tensor once: by identity, and by the memory that it shows."""
    seen: set[Any] = set()
    for tensor in tensors:
        keys: list[Any] = [id(tensor)]
        plain = not hasattr(tensor, "__tensor_flatten__") and tensor.layout is torch.strided
        if plain and tensor.device.type != "meta" and tensor.numel():
            keys.append((tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype))
        if seen.isdisjoint(keys):
            seen.update(keys)
            yield tensor


@dataclass(frozen=True, kw_only=True)
class FolderBytes:
    """Apparent sizes of a checkpoint folder's files (as `du --apparent-size --bytes` of each), in bytes."""

    weights: int
    tokenizer: int
    other: int


# The weights are those of the first format that is there: a hub folder often holds several.
_FORMATS = (
    (".safetensors",),
    (".bin", ".xml"),
    (".pt", ".pth"),
    (".gguf",),
    (".onnx", ".onnx_data", ".onnx.data"),
    (".pt2",),
    (".h5",),
)
_EXPORTS = ("onnx", "openvino")  # where an encoder's graph lies
_TRAINER = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")
_TOKENIZER = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens_map",
    "added_tokens",
    "spiece",
    "sentencepiece",
    "chat_template",
)


def bytes_on_disk(folder: str | Path) -> FolderBytes:
    """Bytes of a checkpoint folder: weights, tokenizer, and the rest of it (config, card, other formats).

    Weights and tokenizer lie in the folder itself and in the numbered ones of sentence-transformers
    (`2_Dense`); checkpoints of a training run inside it do not count at all.

    Raises:
        LeanError: no such folder, or no weights in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise LeanError(f"{root} is not a folder: give the folder of a saved model.")
    # A graph beside a checkpoint's own weights is another format; in an exported folder it is the weights.
    graphs = _EXPORTS if (root / "export.json").is_file() else ()
    own: dict[str, int] = {}
    other = 0
    for path in root.rglob("*"):
        *folders, name = path.relative_to(root).parts
        if not path.is_file() or any(f.startswith(("checkpoint-", ".")) for f in folders):
            continue
        own_place = all(f in graphs or (f[:1].isdigit() and "_" in f) for f in folders)
        if own_place and not name.startswith(_TRAINER):
            own["/".join((*folders, name))] = path.stat().st_size
        else:
            other += path.stat().st_size
    ending = next((f for f in _FORMATS if any(name.endswith(f) for name in own)), None)
    if ending is None:
        raise LeanError(f"{root} holds no weight file: give a folder that save_pretrained wrote.")
    weights = tokenizer = 0
    for path_name, size in own.items():
        name = path_name.rpartition("/")[2]
        if name.endswith(ending):
            weights += size
        elif name.startswith(_TOKENIZER) or name.endswith((".model", ".spm")):
            tokenizer += size
        else:
            other += size
    return FolderBytes(weights=weights, tokenizer=tokenizer, other=other)


# --- FLOPs: formulas take shapes (torch wraps them), return multiply-adds times 2 ---


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, heads, length, head_dim = query  # grouped keys and values are broadcast to the query's heads
    return 2 * batch * heads * length * key[-2] * (head_dim + value[-1])


def _left_product(left: Shape, *args: Any, out_shape: Shape = (), **kwargs: Any) -> int:
    """left [..., inner] times anything: each output element takes `inner` multiply-adds."""
    return 2 * prod(out_shape) * left[-1]


def _added_vector(bias: Shape, matrix: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * prod(matrix)


def _formulas() -> dict[Any, Callable[..., int]]:
    table: dict[str, Callable[..., int]] = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_fused_attention_overrideable": _attention,
        "_scaled_dot_product_attention_math_for_mps": _attention,
        "_scaled_dot_product_efficient_attention": _attention,  # torch 2.11's own refuses grouped heads
        "_scaled_dot_product_flash_attention": _attention,
        "_scaled_dot_product_cudnn_attention": _attention,
        "_int_mm": _left_product,
        "_weight_int8pack_mm": _left_product,
        "_weight_int4pack_mm": _left_product,
        "_weight_int4pack_mm_for_cpu": _left_product,
        "_weight_int4pack_mm_with_scales_and_zeros": _left_product,
        "_dyn_quant_matmul_4bit": _left_product,
        "_grouped_mm": _left_product,
        "_scaled_grouped_mm": _left_product,
        "_sparse_semi_structured_linear": _left_product,
        "mv": _left_product,
        "dot": _left_product,
        "addmv": _added_vector,
    }
    return {getattr(_aten, name): formula for name, formula in table.items() if hasattr(_aten, name)}


FORMULAS: Mapping[Any, Callable[..., int]] = _formulas()


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """FLOPs of one call, by operator, and the linears that had to be counted by their shape."""

    total: int
    operators: Mapping[str, int]
    by_shape: tuple[str, ...]


def count_flops(call: Callable[[], Any], model: nn.Module) -> FlopCount:
    """FLOPs of `call()`, which runs `model` (in eager mode: a compiled graph hides its operators).

    The model's linears are watched: one during which the counter sees nothing is counted as
    2 x output elements x input features.
    """
    counter = FlopCounterMode(display=False, custom_mapping=dict(FORMULAS))
    starts: dict[str, int] = {}
    unseen: dict[str, int] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            starts[name] = counter.get_total_flops()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and counter.get_total_flops() == starts[name]:
                inner: Any = module.in_features
                unseen[name] = unseen.get(name, 0) + 2 * output.numel() * inner

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features"):
            handles += [
                module.register_forward_pre_hook(before(name)),
                module.register_forward_hook(after(name)),
            ]
    try:
        with counter, torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    operators = {str(op): count for op, count in counter.get_flop_counts().get("Global", {}).items()}
    if unseen:
        operators["by shape"] = sum(unseen.values())
    return FlopCount(total=sum(operators.values()), operators=operators, by_shape=tuple(unseen))
