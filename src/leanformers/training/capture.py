"""What a forward pass computes inside: hidden states at layer outputs; queries, keys and values of attention.

Layer outputs are taken by hooks on the layers that anatomy names, before a final norm, so that a student
whose last layer is not the teacher's last compares like with like. Attention's inputs are taken where
transformers hands them to the attention function, after rotary positions and for every family alike; no
attention maps are materialised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from leanformers.errors import LeanError

_PREFIX = "leanformers_record_"
_active: list[Record] = []


@dataclass(kw_only=True)
class AttentionInputs:
    """query [batch, heads, length, head_dim]; key, value [batch, key/value heads, length, head_dim]."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    position_bias: Tensor | None = None

    def scores(self) -> Tensor:
        """Scaled scores before mask and softmax, [batch, heads, length, length]."""
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        scores = self.query @ key.transpose(-1, -2) * self.scaling
        return scores if self.position_bias is None else scores + self.position_bias

    def joined(self, name: str) -> Tensor:
        """query, key or value with its heads concatenated, [batch, length, heads * head_dim]."""
        return getattr(self, name).transpose(1, 2).flatten(2)


@dataclass(kw_only=True)
class Record:
    """hidden: outputs of embeddings and layers, [batch, length, hidden_size]. attention: one per layer."""

    hidden: list[Tensor] = field(default_factory=list)
    attention: list[AttentionInputs] = field(default_factory=list)

    def clear(self) -> None:
        self.hidden.clear()
        self.attention.clear()


def plain(model: Any) -> nn.Module:
    """The transformers model inside a peft model; other models as they are."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def recording(model: nn.Module, *, hidden: bool = False, attention: bool = False) -> Iterator[Record]:
    """Fill a Record at each forward pass of `model` inside the context; clear it between passes.

    Raises:
        LeanError: the model has several stacks, or (after a pass) gives its attention inputs to nobody.
    """
    record = Record()
    with contextlib.ExitStack() as stack:
        if hidden:
            stack.enter_context(_record_hidden(plain(model), record))
        if attention:
            stack.enter_context(_record_attention(plain(model), record))
        yield record


@contextlib.contextmanager
def _record_hidden(model: nn.Module, record: Record) -> Iterator[None]:
    from leanformers.anatomy import Anatomy

    layers = Anatomy.of(model).layers
    if len({layer.stack for layer in layers}) > 1:
        raise LeanError(
            f"{type(model).__name__} has an encoder and a decoder; hidden states are matched for models with "
            "one stack, so distil its logits instead."
        )

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record.hidden.append(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, __: Any, output: Any) -> None:
        record.hidden.append(output[0] if isinstance(output, tuple) else output)

    handles = [layers[0].module.register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.module.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _record_attention(model: Any, record: Record) -> Iterator[None]:
    before = model.config._attn_implementation
    name = _register(before)
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise LeanError(
            f"{type(model).__name__} does not hand its attention to transformers' attention interface, so "
            "attention cannot be distilled; use logits and hidden states."
        )
    _active.append(record)
    try:
        yield
    finally:
        _active.remove(record)
        model.set_attn_implementation(before)


def _register(before: str) -> str:
    """An attention function that records its inputs in the newest record, then does what `before` does."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # Eager attention is a function of each model's own file; SDPA computes the same.
    real = "sdpa" if before == "eager" else before
    name = _PREFIX + real
    if name in ALL_ATTENTION_FUNCTIONS:
        return name
    attend = ALL_ATTENTION_FUNCTIONS[real]

    def record_and_attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        for record in _active[-1:]:
            scaling = kwargs.get("scaling")
            record.attention.append(
                AttentionInputs(
                    query=query,
                    key=key,
                    value=value,
                    scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
                    position_bias=kwargs.get("position_bias"),
                )
            )
        return attend(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(name, record_and_attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[real])
    return name


def fingerprint(model: nn.Module) -> str:
    """A hash of all parameters and buffers with their names, 32 hexadecimal digits."""
    import hashlib

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):
        return repr(tensor).encode()
    # A quantised weight is a tensor of tensors: hash the inner ones.
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        return repr(context).encode() + b"".join(bytes(_bytes(getattr(tensor, name))) for name in names)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
