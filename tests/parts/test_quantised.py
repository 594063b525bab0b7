import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from leanformers.errors import LeanError
from leanformers.parts import QuantisedLinear
from leanformers.parts.torchao import quantise_rows

from .making import IN, OUT, linear, masked, random_mask, tokens

pytest.importorskip("torchao")
SCHEMES = ("int8_weight_only", "int8_dynamic")


def carried(old: nn.Module, scheme: str) -> QuantisedLinear:
    part = QuantisedLinear.like(old, scheme)
    part.carry(old)
    return part


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_moves_by_half_a_step_at_most(scheme: str, dtype: torch.dtype) -> None:
    old = linear(in_features=256).to(dtype)
    part = carried(old, scheme)
    error = (old.weight.float() - part.dequantise(torch.float32)).abs()
    assert (error <= part.scale * (0.5 + 1e-4)).all()
    assert part.scale.dtype == torch.float32


def test_weight_only_is_the_product_with_the_dequantised_weight() -> None:
    part = carried(linear(), "int8_weight_only")
    outputs = F.linear(tokens(9), part.dequantise(), part.bias)
    assert (part(tokens(9)) - outputs).norm() <= 1e-5 * outputs.norm()


def test_weight_only_is_what_torchao_computes() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    old = nn.Sequential(linear())
    part = carried(old[0], "int8_weight_only")
    quantize_(old, Int8WeightOnlyConfig(set_inductor_config=False))
    assert torch.equal(part.qdata, old[0].weight.qdata)
    with torch.no_grad():
        torch.testing.assert_close(part(tokens(9)), old(tokens(9)), rtol=1e-6, atol=1e-6)


def test_dynamic_is_what_torchao_computes_but_for_the_step() -> None:
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

    old = linear()
    part = carried(old, "int8_dynamic")
    settings = QuantizeTensorToInt8Kwargs(granularity=PerRow())
    theirs = Int8Tensor(part.qdata, part.scale, [1, IN], torch.float32, act_quant_kwargs=settings)
    with torch.no_grad():
        outputs = F.linear(tokens(9), theirs, old.bias)
    assert (part(tokens(9)) - outputs).norm() <= 0.01 * outputs.norm()  # max / 127 here, max / 127.5 there


@pytest.mark.parametrize(("scheme", "limit"), [("int8_weight_only", 0.02), ("int8_dynamic", 0.04)])
def test_the_output_stays_near(scheme: str, limit: float) -> None:
    old = linear(in_features=512, out_features=64)
    hidden_states = torch.randn(50, 512)
    error = carried(old, scheme)(hidden_states) - old(hidden_states)
    assert error.norm() <= limit * old(hidden_states).norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_counted_are_bytes_in_the_file(scheme: str, tmp_path: Path) -> None:
    save_file(carried(linear(), scheme).state_dict(), tmp_path / "part.safetensors")
    raw = (tmp_path / "part.safetensors").read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    assert len(raw) - header == OUT * IN + 4 * OUT + 4 * OUT  # int8 weights, float32 scales, float32 bias


def test_zeros_of_a_masked_weight_stay_zero() -> None:
    part = carried(masked(linear()), "int8_weight_only")
    assert not part.qdata[~random_mask()].any()


def test_a_row_of_zeros_is_kept() -> None:
    old = linear()
    with torch.no_grad():
        old.weight[3] = 0
    for scheme in SCHEMES:
        part = carried(old, scheme)
        assert not part.weight[3].any() and part(tokens(4)).isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_bias_can_be_trained(scheme: str) -> None:
    part = carried(linear(), scheme)
    part(tokens(6)).sum().backward()
    torch.testing.assert_close(part.bias.grad, torch.full((OUT,), 6.0))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_peft_refuses_it_by_name(scheme: str) -> None:
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"query": carried(linear(), scheme)})
    with pytest.raises(ValueError, match=r"QuantisedLinear.* is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2))


def test_bad_input_is_refused() -> None:
    with pytest.raises(LeanError, match="int4"):
        QuantisedLinear.like(linear(), "int4")
    old = linear()
    with torch.no_grad():
        old.weight[0, 0] = float("nan")
    with pytest.raises(LeanError, match="NaN"):
        carried(old, "int8_dynamic")


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(LeanError, match=r"leanformers\[quant\]"):
        quantise_rows(torch.randn(4, 4))


def test_loading_and_running_need_no_torchao(tmp_path: Path) -> None:
    part = carried(linear(), "int8_dynamic")
    save_file(part.state_dict(), tmp_path / "part.safetensors")
    done = python(
        "import sys, torch; sys.modules['torchao'] = None\n"
        "from safetensors.torch import load_file\n"
        "from leanformers.parts import QuantisedLinear\n"
        f"part = QuantisedLinear({IN}, {OUT}, scheme='int8_dynamic', device='meta')\n"
        f"part.load_state_dict(load_file(r'{tmp_path / 'part.safetensors'}'), assign=True)\n"
        f"print(part(torch.ones(2, {IN})).sum().item())"
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(part(torch.ones(2, IN)).sum().item(), rel=1e-5)


def test_quantising_is_silent() -> None:
    done = python("import torch\nfrom leanformers.parts.torchao import quantise_rows\nquantise_rows(torch.eye(4))")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
