"""Token embeddings in int8, and what is tied to them: a language-modelling head, a second embedding.

A tied part keeps the embedding as a plain attribute, not as a submodule: the state dict holds the int8 rows
once, `.to()` moves them once, and a deep copy of the model ties the copies to each other.
"""

import torch
from torch import nn
from torch.nn import functional as F

from leanformers.errors import LeanError
from leanformers.parts.dense import adopt, dense, empty
from leanformers.parts.int8 import float_linear
from leanformers.parts.quantised import Int8Rows
from leanformers.parts.torchao import quantise_rows


def embedding_factor(embedding: nn.Module) -> float:
    """What an embedding multiplies its rows by: transformers' scaled ones (Gemma 3, BART) keep it by name."""
    factor = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return 1.0 if factor is None else float(factor)


class QuantisedEmbedding(Int8Rows):
    """`nn.Embedding` with int8 rows and one float32 scale per row; only the rows looked up are dequantised.

    Args:
        num_embeddings: rows, the vocabulary.
        embedding_dim: width of a row.
        padding_idx: kept for code that reads it.
        factor: what each looked-up row is multiplied by.
        dtype: of the result.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        factor: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device, dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.factor = padding_idx, factor

    @classmethod
    def like(cls, old: nn.Module) -> "QuantisedEmbedding":
        """An unfilled part of the shape, dtype and device of an `nn.Embedding`; needs no torchao.

        Raises:
            LeanError: not an `nn.Embedding`, or one that renormalises its rows.
        """
        if not isinstance(old, nn.Embedding) or old.max_norm is not None:
            raise LeanError(f"{type(old).__name__} is not a plain nn.Embedding; leave it out of the quantised layers.")
        part = cls(
            old.num_embeddings,
            old.embedding_dim,
            old.padding_idx,
            embedding_factor(old),
            old.weight.device,
            old.weight.dtype,
        )
        adopt(part, old)
        return part

    @torch.no_grad()
    def carry(self, old: nn.Embedding) -> None:
        """Quantises the rows of `old`; raises LeanError if torchao is missing or a row is not finite."""
        qdata, scale = quantise_rows(old.weight)
        self.qdata.copy_(qdata)
        self.scale.copy_(scale)

    def rows(self, input: torch.Tensor) -> torch.Tensor:
        """The dequantised rows `[..., width]` of the ids `[...]`, without the factor."""
        return (F.embedding(input, self.qdata) * F.embedding(input, self.scale)).to(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.rows(input) * self.factor

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"


class TiedQuantisedEmbedding(nn.Module):
    """A second embedding on the rows of a first (T5's and BART's encoder and decoder); holds no tensors."""

    source: QuantisedEmbedding

    def __init__(self, source: QuantisedEmbedding, factor: float | None = None) -> None:
        super().__init__()
        self.__dict__["source"] = source
        self.factor = source.factor if factor is None else factor

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised `[rows, width]`, computed on each reading."""
        return self.source.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.source.rows(input) * self.factor


class TiedQuantisedHead(nn.Module):
    """The logits `x W~^T + b` from the rows of a quantised embedding; holds no tensors but the bias.

    Args:
        source: the embedding it is tied to.
        bias: whether the head has a bias `[vocab_size]` of its own (BERT's decoder).
    """

    source: QuantisedEmbedding

    def __init__(self, source: QuantisedEmbedding, bias: bool = False) -> None:
        super().__init__()
        self.__dict__["source"] = source
        self.bias = (
            nn.Parameter(torch.zeros(source.num_embeddings, dtype=source.dtype, device=source.qdata.device))
            if bias
            else None
        )

    @classmethod
    def like(cls, old: nn.Module, source: QuantisedEmbedding) -> "TiedQuantisedHead":
        """An unfilled head in place of the linear `old`, tied to `source`.

        Raises:
            LeanError: the shapes differ.
        """
        weight, bias = dense(old)
        if weight.shape != source.qdata.shape:
            raise LeanError(
                f"The head is {list(weight.shape)} and the embedding {list(source.qdata.shape)}: they cannot be tied."
            )
        part = cls(source)
        part.bias = None if bias is None else empty(tuple(bias.shape), bias)
        adopt(part, old)
        return part

    @torch.no_grad()
    def carry(self, old: nn.Module) -> None:
        """Copies the bias; the weight is the embedding's."""
        bias = dense(old).bias
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    @property
    def in_features(self) -> int:
        return self.source.embedding_dim

    @property
    def out_features(self) -> int:
        return self.source.num_embeddings

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised `[vocab_size, width]`, computed on each reading."""
        return self.source.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return float_linear(hidden_states, self.source.qdata, self.source.scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
