"""Quantisation to int8 by torchao: the linears of the layers, and the token embeddings where asked.

Source: torchao 0.18; symmetric int8 with one scale per output row (weight-only), and the same weights with each
token's activations rounded at run time (dynamic). No calibration. Usually the last step: nothing can be cut
afterwards. The classifier and an untied language-model head stay in float, as does what is named in ``skip``.
Deviations from the card: GPTQ and AWQ are left out, since 4-bit tensors do not run on a CPU in torchao 0.18.
Cost: a byte per weight instead of two or four; FLOPs unchanged. Whether it is faster depends on the machine: measure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from leanformers.anatomy import Anatomy, is_dense, linear_shape
from leanformers.errors import LeanError
from leanformers.methods.base import Choice, Range, Saving, Subject, method, setting
from leanformers.parts import LowRankLinear
from leanformers.surgery import QuantiseEmbeddings, QuantiseLinear


@method("quantization", stock=False, stage="quantise", needs=("torchao",), paper="torchao 0.18")
@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Store the linears of the layers in int8, and the embeddings if asked."""

    scheme: Literal["int8_weight_only", "int8_dynamic"] = setting(
        "int8_weight_only", help="dynamic rounds activations too"
    )
    embeddings: bool = setting(False, help="store the token embeddings (and a head tied to them) in int8 rows too")
    skip: tuple[str, ...] = setting((), help="roles left in float: query, key, value, output, gate, up, down")

    def __call__(self, subject: Subject) -> None:
        paths = self._paths(subject.anatomy)  # a map that is kept would keep the linears in floats
        if not paths and not self.embeddings:
            raise LeanError("method 'quantization': no linear of the layers is left to quantise; check skip.")
        for path in paths:
            subject.apply(QuantiseLinear(path=path, scheme=self.scheme))
        if self.embeddings:
            subject.apply(QuantiseEmbeddings())
        subject.notes["quantised_linears"] = len(paths)

    def _paths(self, anatomy: Anatomy) -> list[str]:
        paths = []
        skipped = anatomy.paths(self.skip)
        for path in anatomy.roles:
            if path in skipped:
                continue
            module = anatomy.module(path)
            if isinstance(module, LowRankLinear):
                paths += [f"{path}.down", f"{path}.up"]
            elif is_dense(module):
                paths.append(path)
        return paths

    def refuses(self, anatomy: Anatomy, task: Any) -> str | None:
        if self.embeddings and not anatomy.is_text:
            return "it has no token embeddings"
        if self.embeddings and not isinstance(anatomy.embeddings, nn.Embedding):
            return f"its embeddings are a {type(anatomy.embeddings).__name__} already; set embeddings to false"
        return None

    def estimate(self, anatomy: Anatomy, length: int = 128) -> Saving:
        saved = 0
        for path in self._paths(anatomy):
            module: Any = anatomy.module(path)
            out_features, in_features = linear_shape(module)
            itemsize: int = module.weight.dtype.itemsize
            saved += out_features * in_features * (itemsize - 1) - 4 * out_features
        table = anatomy.embeddings
        if self.embeddings and isinstance(table, nn.Embedding):
            rows, width = table.weight.shape
            saved += rows * width * (table.weight.element_size() - 1) - 4 * rows
        return Saving(bytes=-saved)

    @classmethod
    def space(cls) -> dict[str, Choice | Range]:
        return {"scheme": Choice(("int8_weight_only", "int8_dynamic")), "embeddings": Choice((False, True))}

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return [{"embeddings": True}]
