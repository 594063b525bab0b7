"""Keep heads: cut an attention down to some of its heads, whole key/value groups where heads share them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from leanformers.anatomy import Anatomy, Attention
from leanformers.errors import LeanError
from leanformers.surgery.config import ConfigView
from leanformers.surgery.edit import Cost, Edit, edit, kept, on_meta
from leanformers.surgery.linears import Cut, column_flops, column_parameters, cut, row_flops, row_parameters


@edit("keep_heads")
@dataclass(frozen=True, kw_only=True)
class KeepHeads(Edit):
    """Keep ``size`` key/value heads of the attention at ``path``, with all query heads that share them.

    Where every head has its own key and value, that is ``size`` heads. ``apply`` takes ``keep`` (int64,
    [size], ascending): which.
    """

    path: str
    size: int

    def _attention(self, anatomy: Anatomy) -> Attention:
        attention = anatomy.attention(self.path)
        if anatomy.family.shared_position_bias:
            raise LeanError(
                f"{self.path}: {anatomy.family.name} shares one position bias of all heads between its layers, "
                "so heads cannot be dropped layer by layer."
            )
        return attention

    def apply(self, anatomy: Anatomy, keep: torch.Tensor | None = None, **tensors: object) -> None:
        attention = self._attention(anatomy)
        groups = attention.num_key_value_heads
        index = kept(keep, self.size, groups, f"key/value heads of {self.path}", on_skeleton=on_meta(attention.module))
        queries = _rows(index, attention.num_attention_heads // groups * attention.head_dim)
        pairs = _rows(index, attention.head_dim)
        parts = [(attention.query, queries), (attention.key, pairs), (attention.value, pairs)]
        if attention.query.rows is None:
            cuts = [Cut(p.path, p.module, 0, rows) for p, rows in parts]
        else:
            fused = torch.cat([p.rows[rows] for p, rows in parts if p.rows is not None]).sort().values
            cuts = [Cut(attention.query.path, attention.query.module, 0, fused)]
        cuts += [Cut(p.path, p.module, 0, queries) for p in attention.extra]
        cuts.append(Cut(attention.output.path, attention.output.module, 1, queries))
        cut(cuts)
        _set_counts(attention, len(queries) // attention.head_dim, self.size)

    def cost(self, anatomy: Anatomy) -> Cost:
        attention = self._attention(anatomy)
        gone = attention.num_key_value_heads - self.size
        per_group = attention.num_attention_heads // attention.num_key_value_heads
        queries, pairs = gone * per_group * attention.head_dim, gone * attention.head_dim
        widths = [(attention.query, queries), (attention.key, pairs), (attention.value, pairs)]
        widths += [(projection, queries) for projection in attention.extra]
        parameters = queries * column_parameters(attention.output.module)
        per_token, per_sequence = queries * column_flops(attention.output.module), 0
        for projection, count in widths:
            parameters += count * row_parameters(projection.module)
            flops = count * row_flops(projection.module)
            per_token += flops * anatomy.rows(projection.path).per_token
            per_sequence += flops * anatomy.rows(projection.path).per_sequence
        per_token += 2 * attention.position_terms * attention.positions * queries
        return Cost(parameters=-parameters, per_token=-per_token, per_pair=-4 * queries, per_sequence=-per_sequence)


def _rows(groups: torch.Tensor, width: int) -> torch.Tensor:
    """Rows [len(groups) * width] of the kept groups, ``width`` rows each."""
    return (groups[:, None] * width + torch.arange(width)).reshape(-1)


def _set_counts(attention: Attention, heads: int, key_value_heads: int) -> None:
    module, width = attention.module, heads * attention.head_dim
    counts = {
        "num_attention_heads": heads,
        "num_heads": heads,
        "n_heads": heads,
        "num_key_value_heads": key_value_heads,
        "all_head_size": width,
        "inner_dim": width,
        "split_size": width,
    }
    for name, value in counts.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)
    if attention.query.fused and getattr(module, "config", None) is not None:
        # Phi-3 splits its fused projection by the config's head count at every call.
        module.config = ConfigView.over(module.config, num_attention_heads=heads, num_key_value_heads=key_value_heads)
