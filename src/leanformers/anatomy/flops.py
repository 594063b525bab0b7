"""FLOPs from shapes alone, a multiply-add being 2.

Counted are the products that torch's counter counts: linears and attention's scores and sums, over the full
square of positions. Left out are what is not a linear or an attention: convolutions, the making of rotary
tables, norms and activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from leanformers.anatomy.parts import Attention, is_linear, linear_shape

if TYPE_CHECKING:
    from leanformers.anatomy.anatomy import Anatomy

# Heads of these models see one position (or one pooled vector) of a sequence, others see every position.
_SEQUENCE_HEADS = (
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForImageClassification",
    "ForImageClassificationWithTeacher",
    "ForAudioClassification",
)


def sees_one_vector(model: nn.Module) -> bool:
    """Whether the class is one whose head sees one position, or one pooled vector, of a sequence."""
    return type(model).__name__.endswith(_SEQUENCE_HEADS)


class Rows(NamedTuple):
    """How many rows (mostly tokens) a linear multiplies in a sequence: per_token * length + per_sequence."""

    per_token: int
    per_sequence: int

    def count(self, length: int) -> int:
        return self.per_token * length + self.per_sequence


def linear_flops(module: nn.Module) -> int:
    """FLOPs of a linear on one row; a factorised linear is the sum of its two."""
    down, up = getattr(module, "down", None), getattr(module, "up", None)
    if isinstance(down, nn.Module) and isinstance(up, nn.Module):
        return linear_flops(down) + linear_flops(up)
    own = getattr(module, "row_flops", None)  # a linear that computes another way
    if isinstance(own, int):
        return own
    out_features, in_features = linear_shape(module)
    return 2 * out_features * in_features


def block_rows(anatomy: Anatomy) -> dict[str, Rows]:
    """The rows of every linear of the blocks, by path."""
    rows: dict[str, Rows] = {}
    for layer in anatomy.layers:
        for attention in layer.attentions():
            for _, projection in attention.projections():
                rows[projection.path] = Rows(1, 0)
            through = attention.extra or (attention.query, attention.key)
            for projection in through if attention.positions else ():
                rows[projection.path] = Rows(0 if attention.extra else 1, attention.positions)
        for _, projection in layer.feed_forward.projections():
            rows[projection.path] = Rows(1, 0)
    return rows


def outer_rows(anatomy: Anatomy) -> dict[str, Rows]:
    """The rows of every other linear, by name in the whole model: heads, poolers, embedding projections."""
    model, head = anatomy.model, anatomy.head
    inside = tuple(f"{anatomy.prefix}{layer.path}." for layer in anatomy.layers)
    one_position = sees_one_vector(model) and not anatomy.family.scores_every_position
    rows: dict[str, Rows] = {}
    for name, module in outer_linears(model):
        if name.startswith(inside):
            continue
        in_base = anatomy.base is model or name.startswith(anatomy.prefix)
        pooled = _under(name.removeprefix(anatomy.prefix) if in_base else name, anatomy.family.pooled)
        outside = not in_base and module is not head
        rows[name] = Rows(0, 1) if pooled or (outside and one_position) else Rows(1, 0)
    return rows


def _under(name: str, paths: tuple[str, ...]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def outer_linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Linears and their names, without the two inside a factorised one."""
    for name, child in module.named_children():
        if is_linear(child):
            yield prefix + name, child
        else:
            yield from outer_linears(child, f"{prefix}{name}.")


def attention_flops(attention: Attention, length: int, keys: int) -> int:
    """FLOPs of scores and sums, without the projections."""
    width = attention.num_attention_heads * attention.head_dim
    return 4 * length * keys * width + 2 * attention.position_terms * length * attention.positions * width


def layer_flops(
    anatomy: Anatomy,
    length: int,
    source_length: int | None = None,
    reducers: Mapping[int, Any] | None = None,
) -> int:
    """FLOPs of all layers on one sequence. reducers: what would drop tokens, by layer, in place of what does."""
    source = length if source_length is None else source_length
    both = len(anatomy.stacks) > 1
    rows = block_rows(anatomy)
    seen: dict[str, int] = {}
    left: dict[str, int] = {}
    flops = 0
    for layer in anatomy.layers:
        first = source if both and layer.stack == "encoder" else length
        tokens = left.get(layer.stack, first)
        reducer = layer.reducer if reducers is None else reducers.get(layer.index)
        kept = tokens if reducer is None else reducer.kept(tokens, first)
        left[layer.stack] = kept
        if reducer is not None:
            heads, width = layer.attention.num_attention_heads, layer.attention.key.out_features
            flops += reducer.score_flops(tokens, heads, width)
        for attention in layer.attentions():
            if attention.cross and not both:  # a decoder alone skips it
                continue
            keys = source if attention.cross else tokens
            flops += attention_flops(attention, tokens, keys)
            for role, projection in attention.projections():
                seen[projection.path] = keys if role in ("key", "value") else tokens
            for projection in attention.extra:
                seen[projection.path] = tokens
        for _, projection in layer.feed_forward.projections():
            seen[projection.path] = kept if reducer is not None and reducer.before_feed_forward else tokens
        shortcuts = (getattr(module, "shortcut", None) for module in layer.module.modules())
        flops += sum(tokens * linear_flops(module) for module in shortcuts if isinstance(module, nn.Module))
    for path, tokens in seen.items():
        flops += rows[path].count(tokens) * linear_flops(anatomy.module(path))
    return flops


def model_flops(anatomy: Anatomy, length: int, source_length: int | None = None) -> int:
    """FLOPs of one forward pass over one sequence: layers, heads, poolers, embedding projections."""
    modules = dict(outer_linears(anatomy.model))
    outer = sum(rows.count(length) * linear_flops(modules[name]) for name, rows in outer_rows(anatomy).items())
    return layer_flops(anatomy, length, source_length) + outer
