"""Which graph of llama.cpp computes a model, and the sizes that its file declares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from leanformers.anatomy import Anatomy, Layer
from leanformers.errors import LeanError

# What stands for a part that is gone where the file cannot say zero: one head, or this many neurons, all zero.
GONE_WIDTH = 32


@dataclass(frozen=True, kw_only=True)
class Family:
    """What llama.cpp knows of a family: its architecture's name, the one that takes a size per layer (None:
    there is none), its activation, and whether it rotates neighbouring rows of a head."""

    architecture: str
    uneven: str | None
    activation: str
    neighbours: bool


_LLAMA = Family(architecture="llama", uneven="deci", activation="silu", neighbours=True)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "phi3": _LLAMA,  # its fused projections are written apart
    "qwen3": Family(architecture="qwen3", uneven=None, activation="silu", neighbours=False),
    "gemma3": Family(architecture="gemma3", uneven=None, activation="gelu_pytorch_tanh", neighbours=False),
}
_ROPES = ("default", "linear", "llama3")  # constant factors on the frequencies, without a gain


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A model as llama.cpp will compute it.

    `heads`, `key_value_heads` and `widths` hold one number per layer, as the file declares them.
    `frequency_factors` [head_dim / 2] divide the rotary frequencies, None where all are one.
    """

    architecture: str
    family: Family
    anatomy: Anatomy
    heads: tuple[int, ...]
    key_value_heads: tuple[int, ...]
    widths: tuple[int, ...]
    head_dim: int
    context_length: int
    rope_theta: float
    frequency_factors: torch.Tensor | None

    @classmethod
    def of(cls, model: Any) -> Graph:
        """Read a causal language model.

        Raises:
            LeanError: llama.cpp has no graph for it, or what is special in it is not in that graph.
        """
        anatomy = Anatomy.of(model)
        family = FAMILIES.get(anatomy.family.name)
        name = type(model).__name__
        if family is None or anatomy.head is None or name.endswith("Classification"):
            raise LeanError(
                f"{name} cannot be written as GGUF: only causal language models of {', '.join(FAMILIES)} are, "
                "whose results in llama.cpp are proved equal; choose another runtime."
            )
        _check(anatomy, family)
        sizes = [_sizes(layer) for layer in anatomy.layers]
        even = len(set(sizes)) == 1 and 0 not in sizes[0]
        if not even and family.uneven is None:
            raise LeanError(_uneven(anatomy, sizes))
        heads, key_value_heads, widths = zip(*sizes, strict=True)
        theta, factors = _rotation(anatomy, family)
        return cls(
            architecture=family.architecture if even else str(family.uneven),
            family=family,
            anatomy=anatomy,
            # llama.cpp takes the head size for zero if the first layer has no heads.
            heads=(heads[0] or 1, *heads[1:]),
            key_value_heads=(key_value_heads[0] or 1, *key_value_heads[1:]),
            # With a width of zero `deci` leaves out the attention of that layer as well.
            widths=tuple(width or GONE_WIDTH for width in widths),
            head_dim=anatomy.layers[0].attention.head_dim,
            context_length=_context(anatomy),
            rope_theta=theta,
            frequency_factors=factors,
        )

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        table: Any = self.anatomy.embeddings
        return int(table.num_embeddings)

    @property
    def uneven(self) -> bool:
        """Whether the file declares sizes per layer."""
        return self.architecture == self.family.uneven


def _sizes(layer: Layer) -> tuple[int, int, int]:
    attention = layer.attention
    return attention.num_attention_heads, attention.num_key_value_heads, layer.feed_forward.intermediate_size


def _uneven(anatomy: Anatomy, sizes: list[tuple[int, int, int]]) -> str:
    index = next((i for i, size in enumerate(sizes) if size != sizes[0]), 0)
    names = ("heads", "key/value heads", "neurons")
    differing = [f"{size} {name}" for size, name in zip(sizes[index], names, strict=True)]
    first = [f"{size} {name}" for size, name in zip(sizes[0], names, strict=True)]
    takers = ", ".join(name for name, family in FAMILIES.items() if family.uneven)
    return (
        f"{anatomy.layers[index].path} has {', '.join(differing)} and {anatomy.layers[0].path} has {', '.join(first)}: "
        f"llama.cpp takes layers of different width for {takers} alone, not for {anatomy.family.name}; keep the same "
        "sizes in every layer, or choose another runtime."
    )


def _check(anatomy: Anatomy, family: Family) -> None:
    """Refuse what the graph would compute otherwise, or not at all."""
    config, wide = anatomy.config, float(anatomy.layers[0].attention.head_dim)
    if anatomy.family.name == "gemma3" and len(anatomy.layers) == 62:
        # llama.cpp knows Gemma 3 27B by its number of layers, and scales its scores by another size.
        wide = anatomy.hidden_size / max(layer.attention.num_attention_heads for layer in anatomy.layers)
    refusals = [
        (getattr(anatomy.head, "bias", None) is not None, "a bias on its head"),
        (getattr(config, "attn_logit_softcapping", None), "soft-capped attention"),
        (getattr(config, "final_logit_softcapping", None), "soft-capped logits"),
    ]
    for layer in anatomy.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        scale = getattr(attention.module, "scaling", wide**-0.5)
        other = feed_forward.activation != family.activation or feed_forward.gate is None
        refusals += [
            (attention.mixer is not None, f"another rule of attention at {attention.path}"),
            (not attention.causal, f"attention that is not causal at {attention.path}"),
            (abs(scale * wide**0.5 - 1) > 1e-6, f"attention scores scaled by {scale} at {attention.path}"),
            (other, f"a feed-forward other than gated {family.activation} at {feed_forward.path}"),
        ]
    for norm in anatomy.norms:
        kind = type(norm.module)
        plain = kind.__name__.endswith("RMSNorm") and kind.__module__.startswith("transformers.")
        refusals.append((not plain, f"a norm other than RMSNorm at {norm.path}"))
    refusals += [(True, f"further parameters ({name})") for name in _further(anatomy)]
    for wrong, what in refusals:
        if wrong:
            raise LeanError(
                f"{type(anatomy.model).__name__} has {what}, which llama.cpp's graph {family.architecture!r} does not "
                "compute: choose another runtime."
            )


def _further(anatomy: Anatomy) -> Iterator[str]:
    """Names of the parameters that belong to no part of the map."""
    parts: list[Any] = [anatomy.embeddings, anatomy.head, *(norm.module for norm in anatomy.norms)]
    parts += [projection.module for projection in anatomy.linears().values()]
    parts += [norm for layer in anatomy.layers for norm in (layer.attention.query_norm, layer.attention.key_norm)]
    known = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    for name, parameter in anatomy.model.named_parameters():
        if id(parameter) not in known:
            yield name


def _rotation(anatomy: Anatomy, family: Family) -> tuple[float, torch.Tensor | None]:
    """The base of the rotary frequencies, and what divides them."""
    parameters = anatomy.config.rope_parameters
    kinds = [parameters]
    if anatomy.family.name == "gemma3":
        kinds = [parameters["sliding_attention"], parameters["full_attention"]]
    for rope in kinds:
        kind = rope.get("rope_type", "default")
        if kind not in _ROPES or (kind != "default" and not family.neighbours):
            raise LeanError(
                f"{type(anatomy.model).__name__} scales its rotary positions ({kind}) in a way that llama.cpp's graph "
                f"{family.architecture!r} does not follow: choose another runtime."
            )
        if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
            raise LeanError(
                f"{type(anatomy.model).__name__} rotates a part of each head alone, which llama.cpp's graph "
                f"{family.architecture!r} does not: choose another runtime."
            )
    theta, head_dim = float(kinds[-1]["rope_theta"]), anatomy.layers[0].attention.head_dim
    if kind == "default":
        return theta, None
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    rotary: Any = anatomy.module("rotary_emb")
    return theta, (plain / rotary.inv_freq.double().cpu()).float()  # [head_dim / 2]


def _context(anatomy: Anatomy) -> int:
    """Tokens up to which the graph is the model's own: LLaMA's and Qwen's have no window that slides."""
    longest = int(anatomy.config.max_position_embeddings)
    window = getattr(anatomy.config, "sliding_window", None)
    return longest if anatomy.family.name == "gemma3" else min(longest, window or longest)
