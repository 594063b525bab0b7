"""The residual stream's readers and writers are all mapped: in another basis the model is the same model.

Turning every writer's output and every reader's input by an orthogonal matrix changes nothing that can be
seen from outside, if none is forgotten. RMSNorms commute with any rotation once their gains are folded into
the readers; LayerNorms commute with permutations, their gains and biases being permuted along.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from families import TINY, family, inputs, outputs
from leanformers.anatomy import Anatomy, Norm, Projection

RMS_NORM = [name for name in TINY if family(name).rms_norm]
# The classifiers of these two read the mean of the stream through parts of their own.
AVERAGED = ("dinov2", "dinov2-swiglu", "audio-spectrogram-transformer")
POST_NORM = (
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "mpnet",
    "deberta-v2",
    "opt-post-norm",
    "bart",
    "wav2vec2",
)
CASES = [
    (name, head)
    for name, tiny in TINY.items()
    for head in (*tiny.heads, "base")
    if head == "base" or name not in AVERAGED
]


def weight(projection: Projection) -> torch.Tensor:
    """The module's whole weight as [out, in], sharing its memory."""
    return projection.module.weight.t() if projection.transposed else projection.module.weight


def rows(projection: Projection) -> Any:
    return slice(None) if projection.rows is None else projection.rows


def untie(model: Any) -> None:
    """Give the language-model head a weight of its own: encoders decode something else than the stream."""
    head = model.get_output_embeddings()
    if head is not None:
        head.weight = nn.Parameter(head.weight.clone())


def turn(anatomy: Anatomy, basis: torch.Tensor, *, norms: bool) -> None:
    """Write and read the stream in another basis [hidden_size, hidden_size]: x becomes x @ basis."""
    for reader in [*anatomy.residual.reads, *anatomy.residual.outputs.values()]:
        weight(reader)[rows(reader)] = reader.weight() @ basis
    for module in [*(writer.module for writer in anatomy.residual.writes), *anatomy.residual.inputs.values()]:
        kernel = weight(Projection("", module)) if module.weight.ndim == 2 else module.weight
        kernel.copy_(torch.einsum("oi,o...->i...", basis, kernel))
        if module.bias is not None:
            module.bias.copy_(module.bias @ basis)
    for table in anatomy.residual.tables.values():
        table.copy_(table @ basis)
    for norm in anatomy.norms if norms else ():
        for parameter in norm.module.parameters():
            if len(parameter) == len(basis):
                parameter.copy_(parameter @ basis)


def visible(model: Any, batch: dict[str, Any], basis: torch.Tensor | None = None) -> torch.Tensor:
    """Logits, or the last hidden state in the basis that it had before."""
    result = outputs(model, batch)
    headless = Anatomy.of(model).base is model and model.get_output_embeddings() is None
    return result @ basis.T if headless and basis is not None and len(basis) == result.shape[-1] else result


@pytest.mark.parametrize(("name", "head"), CASES)
@torch.no_grad()
def test_permutation(name: str, head: str) -> None:
    model = TINY[name](head=head)
    untie(model)
    if name.startswith("wav2vec2"):  # its convolution for positions mixes neighbours in the stream: silence it
        convolution = Anatomy.of(model).base.encoder.pos_conv_embed.conv
        convolution.parametrizations.weight.original0.zero_()
        convolution.bias.zero_()
    anatomy, batch = Anatomy.of(model), inputs(model, padded=True)
    basis = torch.eye(anatomy.hidden_size)[torch.randperm(anatomy.hidden_size)]
    before = visible(model, batch)
    turn(anatomy, basis, norms=True)
    torch.testing.assert_close(visible(model, batch, basis), before, rtol=1e-4, atol=1e-4)


def fold(anatomy: Anatomy, norm: Norm) -> None:
    gain = anatomy.residual.gain(norm).clone()
    for reader in anatomy.residual.readers(norm):
        weight(reader)[rows(reader)] = reader.weight() * gain
    norm.module.weight.fill_(0 if anatomy.family.norm_offset else 1)


@pytest.mark.parametrize("name", RMS_NORM)
@torch.no_grad()
def test_rotation(name: str) -> None:
    model = TINY[name](head="lm")
    untie(model)
    anatomy, batch = Anatomy.of(model), inputs(model, padded=True)
    for norm in anatomy.norms:
        if norm.place == "output":  # not foldable: the writer's output is normed before it is added
            norm.module.weight.fill_(0 if anatomy.family.norm_offset else 1)
    before = outputs(model, batch)
    for norm in anatomy.norms:
        if norm.place != "output":
            assert anatomy.residual.readers(norm)
            fold(anatomy, norm)
    torch.testing.assert_close(outputs(model, batch), before, rtol=1e-4, atol=1e-4)
    rotation = torch.linalg.qr(torch.randn(anatomy.hidden_size, anatomy.hidden_size)).Q
    turn(anatomy, rotation, norms=False)
    torch.testing.assert_close(outputs(model, batch), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in TINY if name not in RMS_NORM])
@torch.no_grad()
def test_folding_layer_norms(name: str) -> None:
    """The gain and the bias of a norm off the stream can be moved into what reads it."""
    model = TINY[name](head="lm" if "lm" in TINY[name].heads else "base")
    untie(model)
    anatomy, batch = Anatomy.of(model), inputs(model)
    folded = [norm for norm in anatomy.norms if norm.place == "pre"]
    assert bool(folded) is not (name in POST_NORM or (anatomy.family.name in POST_NORM and name != "wav2vec2-stable"))
    before = outputs(model, batch)
    for norm in folded:
        gain, bias = anatomy.residual.gain(norm).clone(), norm.module.bias.clone()
        for reader in anatomy.residual.readers(norm):
            if reader.module.bias is None:
                reader.module.bias = nn.Parameter(torch.zeros(len(reader.module.weight)))
            reader.module.bias[rows(reader)] += reader.weight() @ bias
            weight(reader)[rows(reader)] = reader.weight() * gain
        norm.module.weight.fill_(1)
        norm.module.bias.fill_(0)
    torch.testing.assert_close(outputs(model, batch), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_every_part_is_mapped(name: str) -> None:
    """No linear of a layer and no norm as wide as the stream stands beside the map."""
    anatomy = Anatomy.of(TINY[name]())
    mapped = {id(projection.module) for projection in anatomy.linears().values()}
    for layer in anatomy.layers:
        for path, module in layer.module.named_modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                assert id(module) in mapped, f"{layer.path}.{path}"
    norms = {id(norm.module) for norm in anatomy.norms}
    for path, module in anatomy.base.named_modules():
        gain = getattr(module, "weight", getattr(module, "lambda1", None))
        if isinstance(gain, nn.Parameter) and gain.shape == (anatomy.hidden_size,):
            assert id(module) in norms, path
