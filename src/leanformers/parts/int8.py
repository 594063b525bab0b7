"""Products with an int8 matrix: plain PyTorch everywhere, and the CPU's integer kernel where it is exact.

The kernel is FBGEMM's, which PyTorch ships for x86. It serves inference alone: training and exporters see
the plain operations. torchao's own path (`torch._int_mm`) is many times slower than floats without VNNI.
"""

import warnings
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

EPSILON = torch.finfo(torch.float32).eps


def token_scale(hidden_states: torch.Tensor) -> torch.Tensor:
    """Each token's step `max|x| / 127`: float `[..., in]` -> `[..., 1]`.

    torchao divides by 127.5. That puts the largest value of every token half way between two integers,
    where it depends on the last bit, and so on the compiler, which one it becomes.
    """
    return (hidden_states.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(EPSILON)


def round_tokens(hidden_states: torch.Tensor) -> torch.Tensor:
    """Rounds each token `[..., in]` to the int8 grid of its own scale; the gradient passes straight through.

    Returns integers times the scale, in the dtype of the input.
    """
    exact = hidden_states.detach().float()
    scale = token_scale(exact)
    rounded = ((exact / scale).round() * scale).to(hidden_states.dtype)
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        return hidden_states + (rounded - hidden_states).detach()
    return rounded


def float_linear(
    hidden_states: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x (scale * qdata)^T + bias`: float `[..., in]`, int8 `[out, in]`, float32 `[out, 1]` -> `[..., out]`.

    The scales are multiplied in after the product, which is cheaper than dequantising the weight.
    """
    if hidden_states.dtype == torch.float16:  # sums of unscaled integers could pass 65,504
        return F.linear(hidden_states, (qdata * scale).to(torch.float16), bias)
    outputs = F.linear(hidden_states, qdata.to(hidden_states.dtype)) * scale[:, 0]
    if bias is not None:
        outputs = outputs + bias
    return outputs.to(hidden_states.dtype)


def dynamic_linear(
    hidden_states: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`float_linear(round_tokens(x), …)`, by integers where this machine is good at them."""
    trained = hidden_states.requires_grad or (bias is not None and bias.requires_grad)
    plain = (
        hidden_states.device.type != "cpu"
        or hidden_states.dtype != torch.float32
        or (trained and torch.is_grad_enabled())
        or torch.compiler.is_exporting()
        or torch.jit.is_tracing()
    )
    if plain:
        return float_linear(round_tokens(hidden_states), qdata, scale, bias)
    return torch.ops.leanformers.dynamic_linear(hidden_states, qdata, scale, bias)


class _Packed(NamedTuple):
    storage: StorageWeakRef  # kept weakly: holds the address, so that no other storage can be taken for it
    version: tuple[int, int]
    weight: Any  # FBGEMM's packed matrix, or None where it would not be exact


_packed: dict[tuple[int, int, torch.Size], _Packed] = {}


def _pack(qdata: torch.Tensor, scale: torch.Tensor) -> Any:
    """FBGEMM's packed form of the matrix, or None if this machine has no exact kernel for it.

    Without VNNI the kernel adds two products of a uint8 and an int8 in 16 bits, which saturate. With
    weights of at most 64 in size they cannot: 2 * 255 * 64 < 2^15.
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines or not _exact(qdata):
        return None
    engine = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = "fbgemm"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of its quantised tensors
            zeros = torch.zeros(len(qdata), dtype=torch.int64)
            matrix = torch._make_per_channel_quantized_tensor(qdata, scale[:, 0].double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(matrix, None)
    except (AttributeError, RuntimeError):  # a torch that has dropped them
        return None
    finally:
        torch.backends.quantized.engine = engine


def _exact(qdata: torch.Tensor) -> bool:
    return qdata.numel() > 0 and int(qdata.min()) >= -64 and int(qdata.max()) <= 64


def packed(qdata: torch.Tensor, scale: torch.Tensor) -> Any:
    """The packed matrix of these two tensors, made anew whenever either was written to; None: use floats.

    It costs the memory of `qdata` a second time, and goes with the storage of `qdata`.
    """
    if qdata.is_inference() or scale.is_inference():
        return None  # no version counter tells of a write
    storage = qdata.untyped_storage()
    key = (storage._cdata, int(qdata.storage_offset()), qdata.shape)
    version = (qdata._version, scale._version)
    found = _packed.get(key)
    if found is None or found.version != version:
        for dead in [key for key, entry in _packed.items() if entry.storage.expired()]:
            del _packed[dead]
        found = _packed[key] = _Packed(StorageWeakRef(storage), version, _pack(qdata, scale))
    return found.weight


_library = torch.library.Library("leanformers", "FRAGMENT")
_library.define("dynamic_linear(Tensor hidden_states, Tensor qdata, Tensor scale, Tensor? bias) -> Tensor")


@torch.library.impl(_library, "dynamic_linear", "CPU")
def _dynamic_linear(
    hidden_states: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    weight = packed(qdata, scale)
    if weight is None or hidden_states.numel() == 0:
        return float_linear(round_tokens(hidden_states), qdata, scale, bias)
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    step = token_scale(tokens)
    # The input counts in its own steps: a scale of 1 and a zero at 128 make FBGEMM's uint8 our int8.
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    outputs = multiply(tokens / step, 1.0, 128, weight)  # [tokens, out]
    outputs = outputs.mul_(step) if bias is None else torch.addcmul(bias, outputs, step)
    return outputs.reshape(*hidden_states.shape[:-1], qdata.shape[0])


@torch.library.register_fake("leanformers::dynamic_linear", lib=_library)
def _(hidden_states: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return hidden_states.new_empty((*hidden_states.shape[:-1], qdata.shape[0]))


@register_flop_formula(torch.ops.leanformers.dynamic_linear)
def _flops(hidden_states: torch.Size, qdata: torch.Size, *rest: object, **shapes: object) -> int:
    """As of the float product, a multiply-add counted as two; `[..., in]`, `[out, in]`."""
    return 2 * hidden_states.numel() * qdata[0]
