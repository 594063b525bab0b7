"""What every linear part must keep to, whichever layer it replaces."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from leanformers.errors import LeanError

from .making import IN, LAYERS, OUT, PARTS, linear, reload, tokens

pytestmark = [
    pytest.mark.parametrize("layer", LAYERS),
    pytest.mark.parametrize("name", PARTS),
]
NAMES = {
    "low rank": {"down.weight", "up.weight"},
    "dense sparse": {"dictionary", "values", "packed"},
    "dense sparse, factored": {"dictionary", "values", "packed"},
    "masked": {"weight", "mask_bits"},
    "int8 weight-only": {"qdata", "scale"},
    "int8 dynamic": {"qdata", "scale"},
}


def made(name: str, layer: str) -> nn.Module:
    return PARTS[name](LAYERS[layer]()).eval()


def test_names_and_kinds_of_tensors_are_stable(name: str, layer: str) -> None:
    bias = {"low rank": {"up.bias"}}.get(name, {"bias"}) if layer != "no bias" else set()
    state = made(name, layer).state_dict()
    assert set(state) == NAMES[name] | bias
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}


def test_like_takes_shape_dtype_device_and_mode(name: str, layer: str) -> None:
    old = LAYERS[layer]().to("meta", torch.bfloat16).eval()
    old.weight.requires_grad_(False)
    part = PARTS[name](old, filled=False)
    assert (part.in_features, part.out_features, part.training) == (IN, OUT, False)
    assert (part.weight.shape, part.weight.dtype, part.weight.device.type) == (
        (OUT, IN),
        torch.bfloat16,
        "meta",
    )
    assert (part.bias is None) == (layer == "no bias")
    assert part.bias is None or (part.bias.dtype, part.bias.requires_grad) == (torch.bfloat16, True)
    frozen = [p.requires_grad for n, p in part.named_parameters() if "bias" not in n]
    assert not any(frozen)


def test_reload_is_exact(name: str, layer: str, tmp_path: Path) -> None:
    part = made(name, layer)
    again = reload(part, lambda old: PARTS[name](old, filled=False), LAYERS[layer](), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens(2, 5)), part(tokens(2, 5)))
        assert torch.equal(again.weight, part.weight)


def test_a_copy_is_equal_and_apart(name: str, layer: str) -> None:
    part, before = made(name, layer), tokens(2, 5)
    with torch.no_grad():
        outputs = part(before)
        twin = copy.deepcopy(part)
        for tensor in twin.state_dict().values():
            tensor.zero_()
        assert torch.equal(part(before), outputs)
        assert not twin(before).any()


def test_dtype_moves_and_shapes(name: str, layer: str) -> None:
    part = made(name, layer)
    with torch.no_grad():
        wide = part(tokens(2, 5))
        for shape in ((), (1,), (3,), (0, 4), (2, 3, 4)):
            assert part(tokens(*shape)).shape == (*shape, OUT)
        part.to(torch.bfloat16)
        narrow = part(tokens(2, 5).bfloat16())
    assert narrow.dtype == part.weight.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wide, rtol=0.05, atol=0.1)


def test_the_weight_that_is_read_is_the_one_that_acts(name: str, layer: str) -> None:
    part = made(name, layer)
    with torch.no_grad():
        outputs = nn.functional.linear(torch.eye(IN), part.weight, part.bias)
        torch.testing.assert_close(part(torch.eye(IN)), outputs, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_input(name: str, layer: str) -> None:
    part, hidden_states = made(name, layer), tokens(7).requires_grad_()
    part(hidden_states).sum().backward()
    expected = part.weight.sum(dim=0).detach().expand(7, IN)
    torch.testing.assert_close(hidden_states.grad, expected, rtol=1e-4, atol=1e-5)


def test_compiled_and_exported_say_the_same(name: str, layer: str) -> None:
    part = made(name, layer)
    torch.compiler.reset()
    compiled = torch.compile(part, dynamic=True, fullgraph=True, backend="aot_eager")
    length = torch.export.Dim("length", min=1, max=512)
    exported = torch.export.export(part, (tokens(4),), dynamic_shapes=({0: length},)).module()
    with torch.no_grad():
        for count in (4, 9):
            outputs = part(tokens(count))
            torch.testing.assert_close(compiled(tokens(count)), outputs, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(exported(tokens(count)), outputs, rtol=1e-5, atol=1e-5)


def test_only_float_linears_are_replaced(name: str, layer: str) -> None:
    with pytest.raises(LeanError, match="not a linear layer"):
        PARTS[name](nn.LayerNorm(IN))
    whole = linear()
    whole.weight = nn.Parameter(torch.ones(OUT, IN, dtype=torch.int8), requires_grad=False)
    with pytest.raises(LeanError, match="int8"):
        PARTS[name](whole)
