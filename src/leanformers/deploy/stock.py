"""What keeps a lean model from being a stock one, and what the nearest stock shape would cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from leanformers.anatomy import Anatomy, Layer
from leanformers.errors import LeanError
from leanformers.parts.dense_sparse import DenseSparseLinear
from leanformers.parts.linear import LowRankLinear
from leanformers.parts.masked import MaskedLinear
from leanformers.parts.quantised import Int8Rows
from leanformers.surgery import tier


def check_stock(model: Any) -> None:
    """Refuse a model whose shapes transformers cannot describe by a config alone.

    Raises:
        LeanError: names the layers, and what the nearest stock shape would cost in parameters.
    """
    if tier(model) != "stock":
        reasons = obstacles(model) or ["its shapes fit no config of its class"]
        raise LeanError(
            f"this model cannot be written as a stock {type(model).__name__}: {'; '.join(reasons)}. "
            "Keep the lean checkpoint, or search with --stock"
        )


def obstacles(model: Any) -> list[str]:
    """What a stock class cannot hold, each in a clause with the cost of the nearest shape that it can."""
    anatomy = Anatomy.of(model)
    found = []
    for name, layers in anatomy.stacks.items():
        found += _uneven_widths(name, layers)
        found += _uneven_heads(name, layers)
    modules = dict(anatomy.base.named_modules())
    if mixed := [a.path for layer in anatomy.layers for a in layer.attentions() if a.mixer is not None]:
        found.append(f"{mixed[0]}{f' and {len(mixed) - 1} more' if mixed[1:] else ''} attend by a rule of their own")
    if low_rank := {path: m for path, m in modules.items() if isinstance(m, LowRankLinear | DenseSparseLinear)}:
        extra = sum(_multiplied_out(module) for module in low_rank.values())
        found.append(f"{_linears(low_rank)} factorised: multiplied out they take {extra:+,} parameters")
    if masked := {path: m for path, m in modules.items() if isinstance(m, MaskedLinear)}:
        found.append(f"{_linears(masked)} masked: with the zeros stored as weights they save no bytes")
    if int8 := {path: m for path, m in modules.items() if isinstance(m, Int8Rows)}:
        found.append(f"{_linears(int8)} in int8: as float32 they take 4 times the bytes")
    return found


def _uneven_widths(stack: str, layers: Sequence[Layer]) -> list[str]:
    widths = [layer.feed_forward.intermediate_size for layer in layers]
    if len(set(widths)) < 2:
        return []
    most = max(widths)
    small = [index for index, width in enumerate(widths) if width < most]
    extra = sum((most - widths[i]) * _weights_per_neuron(layers[i]) for i in small)
    return [
        f"layers {_list(small)} of the {stack} have feed-forward widths {_list(sorted({widths[i] for i in small}))} "
        f"and others {most}: filled up with zeros to {most} they take {extra:+,} parameters"
    ]


def _uneven_heads(stack: str, layers: Sequence[Layer]) -> list[str]:
    heads = [(layer.attention.num_attention_heads, layer.attention.num_key_value_heads) for layer in layers]
    if len(set(heads)) < 2:
        return []
    most = max(heads)
    small = [index for index, pair in enumerate(heads) if pair != most]
    extra = 0
    for index in small:
        attention = layers[index].attention
        queries, groups = most[0] - heads[index][0], most[1] - heads[index][1]
        extra += attention.head_dim * attention.output.out_features * 2 * (queries + groups)
    usual = Counter(heads).most_common(1)[0][0]
    return [
        f"layers {_list(small)} of the {stack} have fewer heads than others ({usual[0]} is usual): "
        f"filled up with zeros to {most[0]} they take {extra:+,} parameters"
    ]


def _weights_per_neuron(layer: Layer) -> int:
    part = layer.feed_forward
    return part.down.out_features * (2 if part.gate is None else 3)


def _multiplied_out(module: LowRankLinear | DenseSparseLinear) -> int:
    whole = module.out_features * module.in_features
    return whole - sum(p.numel() for name, p in module.named_parameters() if not name.endswith("bias"))


def _linears(modules: Mapping[str, Any]) -> str:
    first = next(iter(modules))
    return f"{first} is" if len(modules) == 1 else f"{first} and {len(modules) - 1} other modules are"


def _list(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:6]))
    return f"{shown} and {len(values) - 6} more" if len(values) > 6 else shown
