"""Exported graphs answer as their models do, lean or not, at sizes other than those traced; what cannot be is said."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from lean_models import TOLERANCE, Forward, batch, distance, farthest, lean

from families import TINY
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.measure import bytes_in_memory
from leanformers.parts import QuantisedLinear
from leanformers.recipe import apply as apply_recipe
from leanformers.runtimes import available, check, prepare
from leanformers.runtimes import exported as exported_module
from leanformers.runtimes.accuracy import export_within
from leanformers.runtimes.calling import StandIn, call_of, sample_of
from leanformers.runtimes.exported import export_model, missing, trace, weight_bytes
from leanformers.runtimes.quantising import floats, unrounded
from leanformers.runtimes.running import options
from leanformers.surgery import QuantiseLinear, apply

pytestmark = pytest.mark.skipif(missing("this", "dynamo") is not None, reason="needs transformers 5.23")
onnx = pytest.mark.skipif("onnxruntime" not in available(), reason="needs leanformers[onnx]")
openvino = pytest.mark.skipif("openvino" not in available(), reason="needs leanformers[openvino]")
RUNTIMES = [pytest.param("onnxruntime", marks=onnx), pytest.param("openvino", marks=openvino)]


def through_torch_export(model: Any) -> Any:
    """The graph of torch.export as the call of a Prepared."""
    call = call_of(Forward(), model, batch(model, 2, 7, True))
    graph = trace(call, "dynamo").to("cpu").runners["model"]
    return lambda one: Forward().forward(StandIn(graph, frozenset(one), model.config, torch.device("cpu")), one)


# -- what is held ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "share"),
    [
        pytest.param("onnxruntime", 1.0, marks=onnx),
        pytest.param("onnxruntime-int8", 0.43, marks=onnx),  # biases, norms and scales stay floats
        pytest.param("openvino", 1.0, marks=openvino),
    ],
)
def test_a_runtime_says_what_weights_it_holds_once_it_has_them(runtime, share):
    model = TINY["bert"]()
    prepared = prepare(model, Forward(), runtime)
    assert prepared.held() is None
    prepared(batch(model, 2, 7, True))
    assert prepared.held() == pytest.approx(share * bytes_in_memory(model), rel=0.02)


@openvino
def test_weights_in_int8_are_a_quarter():
    model = TINY["bert"]()
    call = call_of(Forward(), model, batch(model, 2, 7, True))
    exported = trace(call, "openvino", "int8", [call.tensors])
    assert weight_bytes(exported) < 0.4 * bytes_in_memory(model)
    assert weight_bytes(trace(call, "dynamo")) == bytes_in_memory(model)


# -- exactness -------------------------------------------------------------------------------------------------


def test_a_lean_model_through_torch_export():
    """Every kind of edit in one model, int8 activations aside, which no graph rounds."""
    model, made = lean("gpt2")
    assert len(made) >= 7
    with unrounded(model):
        assert farthest(through_torch_export(model), model) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "runtime"),
    [
        pytest.param("bert", "openvino", marks=openvino),
        pytest.param("llama", "onnxruntime", marks=onnx),
        pytest.param("t5", "openvino", marks=openvino),
        pytest.param("whisper", "onnxruntime", marks=[onnx, pytest.mark.slow]),
        pytest.param("vit", "onnxruntime", marks=onnx),
    ],
)
def test_lean_models_in_a_runtime(family, runtime):
    """The same; a runtime's graph is made of torch.export's. BERT in ONNX Runtime: tests/deploy."""
    model, made = lean(family)
    assert len(made) >= (5 if family in ("vit", "whisper") else 7)
    prepared = prepare(model, Forward(), runtime)
    with unrounded(model):
        assert farthest(prepared, model) <= TOLERANCE
    assert prepared.describe() == f"{runtime} (cpu, dtype float32, threads {torch.get_num_threads()})"


# -- what an export does to the model ----------------------------------------------------------------------------


def test_the_model_stays_as_it_was():
    model, _ = lean("llama")
    model.train()
    before, attributes = copy.deepcopy(model).eval(), set(vars(model))
    one = batch(model, 2, 7, True)
    exported = trace(call_of(Forward(), model, one), "dynamo")
    assert set(vars(model)) == attributes and model.config.use_cache
    assert model.config.quantization_config.edits  # the ledger is the model's still, and not the graph's
    assert not hasattr(exported.config, "quantization_config")
    assert exported.config.architectures == ["LlamaForCausalLM"]
    with torch.no_grad():
        assert torch.equal(Forward().forward(model.eval(), one), Forward().forward(before, one))
    assert not any("stack_trace" in node.meta for node in exported.program.graph.nodes)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_training_the_model_further_leaves_the_graph_alone(runtime):
    model = TINY["bert"](num_hidden_layers=1, hidden_size=256)
    prepared, one = prepare(model, Forward(), runtime), batch(model, 2, 7, True)
    before = prepared(one).clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(prepared(one), before)


def test_a_sample_has_rows_and_columns_that_cannot_be_taken_for_constants():
    model = TINY["bert"]()
    sample = sample_of(call_of(Forward(), model, batch(model, 1, 1, False)))
    rows, length = sample["input_ids"].shape
    assert rows >= 2 and length >= 3 and rows != length


# -- int8 --------------------------------------------------------------------------------------------------------


class Calibrated(Forward):
    """A task with training rows."""

    name = "calibrated"

    def __init__(self, model: Any) -> None:
        self.model = model

    def calibration(self, tokenizer: Any, samples: int, batch_size: int) -> Any:
        return [batch(self.model, 1, 5 + i % 9, False) for i in range(8)]


@pytest.mark.parametrize(
    "name", [pytest.param("onnxruntime-int8", marks=onnx), pytest.param("openvino-int8", marks=openvino)]
)
def test_int8_runs_and_is_close(name):
    """A random model shows every rounding, so the outputs are close as a whole and not one by one."""
    if name not in available():
        pytest.skip(check_refusal(name))
    model = TINY["bert"](num_hidden_layers=1, hidden_size=128, intermediate_size=256)
    one = batch(model, 32, 11, True)
    expected = Forward().forward(model, one).detach()
    given = {"tokenizer": object()} if name == "openvino-int8" else {}
    prepared = check(name).build(model, Calibrated(model), **given)
    found = prepared(one)
    assert "int8" in prepared.describe() and distance(found, expected) > 1e-6
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.95
    alone = prepared({name: tensor[:1] for name, tensor in one.items()})
    assert prepared.by_batch == bool((alone - found[:1]).abs().max() > 1e-5)


def test_linears_in_int8_are_handed_on_as_what_they_stand_for():
    model = TINY["bert"]()
    path = Anatomy.of(model).layers[0].feed_forward.down.path
    apply(model, QuantiseLinear(path=path, scheme="int8_dynamic"))
    part, one = model.base_model.get_submodule(path), batch(model, 2, 7, True)
    with torch.no_grad():
        rounded = Forward().forward(model, one)
        with unrounded(model):
            plain = Forward().forward(model, one)
            assert part.scheme == "int8_weight_only"
        with floats(model):
            swapped = Forward().forward(model, one)
            assert isinstance(model.base_model.get_submodule(path), torch.nn.Linear)
    assert part.scheme == "int8_dynamic" and model.base_model.get_submodule(path) is part
    torch.testing.assert_close(swapped, plain, rtol=1e-4, atol=1e-5)
    assert not torch.equal(rounded, plain)


@openvino
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_linears_in_int8_stay_so_in_openvino(family, tmp_path):
    """In the file: each matrix once, a byte a value, with its scales; not in floats besides."""
    import openvino

    model = TINY[family](num_hidden_layers=2)
    model = apply_recipe([{"method": "quantization", "skip": ["value"]}], model, copy_model=False)
    exported = trace(call_of(Forward(), model, batch(model, 2, 7, True)), "openvino")
    exported.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.xml")
    graph = openvino.Core().read_model(file)
    constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    held = [node.data for node in constants if node.get_element_type() == openvino.Type.i8]
    matrices = [part.qdata.numpy() for part in model.modules() if isinstance(part, QuantisedLinear)]
    assert len(held) == len(matrices) >= 10
    assert sorted(one.tobytes() for one in held) == sorted(one.tobytes() for one in matrices)
    singles = [node.data for node in constants if node.get_element_type() == openvino.Type.f32]
    assert not any(one.ndim == 2 and min(one.shape) > 1 and bool((one == one.round()).all()) for one in singles)
    compiled = openvino.Core().compile_model(graph, "CPU")
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
    run = exported.to("cpu", **options("openvino")).runners["model"]
    one = batch(model, 3, 6, True)
    found = Forward().forward(StandIn(run, frozenset(one), model.config, torch.device("cpu")), one)
    torch.testing.assert_close(found, Forward().forward(model, one).detach(), rtol=1e-4, atol=1e-4)


@openvino
def test_int8_needs_training_rows():
    model = TINY["bert"]()
    with pytest.raises(LeanError, match="ranges of its activations from training rows, which this task does not give"):
        prepare(model, Forward(), "openvino-int8")(batch(model, 2, 5, True))


class Near(Calibrated):
    """Its quality says how near all outputs are to the model's own."""

    kind, better = "text-classification", "higher"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.rows = [batch(model, 4, 5 + i, True) for i in range(3)]
        self.own = [Forward().forward(model, one).detach() for one in self.rows]

    def evaluate(self, predict: Any, tokenizer: Any, split: str, limit: int) -> dict[str, float]:
        assert split == "validation"
        found = torch.cat([predict(one).flatten() for one in self.rows])
        return {"cosine": torch.cosine_similarity(found, torch.cat([o.flatten() for o in self.own]), dim=0).item()}

    def quality(self, metrics: dict[str, float]) -> float:
        return metrics["cosine"]

    def ratio(self, quality: float, baseline: float) -> float:
        return quality / baseline


@openvino
@pytest.mark.slow
def test_int8_costs_no_more_quality_than_is_allowed():
    if "openvino-int8" not in available():
        pytest.skip(check_refusal("openvino-int8"))
    model = TINY["bert"](num_hidden_layers=1, hidden_size=64, intermediate_size=128)
    apply(model, QuantiseLinear(path=Anatomy.of(model).layers[0].feed_forward.down.path))
    task = Near(model)

    def exported_within(drop: float) -> tuple[int, float]:
        """How many roundings the graph holds, and its quality."""
        rows = task.calibration(None, 8, 1)
        exported = export_within(model, task, None, calibration=rows, max_drop=drop)
        run = exported.to("cpu", **options("openvino")).runners["model"]
        stand_in = StandIn(run, frozenset(task.rows[0]), model.config, torch.device("cpu"))
        found = task.quality(task.evaluate(lambda one: task.forward(stand_in, one), None, "validation", 9))
        return sum(node.get_type_name() == "FakeQuantize" for node in exported.program.get_ops()), found

    plain, quality = exported_within(0.5)
    assert plain > 0 and 0.5 < quality < 1
    drop = (1 - quality) / 2
    count, better = exported_within(drop)
    assert better >= 1 - drop - 1e-6  # what costs more than that stays in floats
    assert count > 0  # and the rest does not


def test_a_drop_is_a_share():
    model = TINY["bert"]()
    with pytest.raises(LeanError, match="max_drop is a share of the source's quality between 0 and 1"):
        export_within(model, Calibrated(model), None, calibration=[], max_drop=1.5)


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hidden", "sentence"),
    [
        (
            "onnxruntime",
            "onnxscript",
            "the runtime 'onnxruntime' needs the packages onnx, onnxruntime and onnxscript: pip install "
            "'leanformers[onnx]'",
        ),
        (
            "openvino",
            "openvino",
            "the runtime 'openvino' needs the package openvino: pip install 'leanformers[openvino]'",
        ),
        ("openvino-int8", "nncf", "needs the packages openvino and nncf: pip install 'leanformers[openvino]'"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name, hidden, sentence):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        exported_module.importlib.util, "find_spec", lambda wanted: None if wanted == hidden else find(wanted)
    )
    assert name not in available()
    with pytest.raises(LeanError) as refusal:
        prepare(TINY["bert"](), Forward(), name)
    assert sentence in str(refusal.value)


def test_an_old_transformers_is_told_to_be_upgraded(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_loader("transformers", loader=None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(exported_module.importlib.util, "find_spec", lambda name: spec)
    for name in ("onnxruntime", "openvino", "torch-aot"):
        assert "needs the exporters of transformers 5.23 or later: pip install --upgrade" in check_refusal(name)


def check_refusal(name: str) -> str:
    with pytest.raises(LeanError) as refusal:
        check(name)
    return str(refusal.value)


def test_bad_requests_are_refused():
    model = TINY["bert"]()
    rows = [batch(model, 2, 5, True)]
    with pytest.raises(LeanError, match="no export to 'abacus'; choose one of onnx, openvino, dynamo"):
        export_model(model, Forward(), "abacus", calibration=rows)
    with pytest.raises(LeanError, match="cannot be quantised as 'int8'; there is no quantisation"):
        export_model(model, Forward(), "dynamo", calibration=rows, quantize="int8")
    with pytest.raises(LeanError, match="no batch to trace the model with"):
        export_model(model, Forward(), "dynamo", calibration=[])


def test_a_batch_with_other_inputs_is_refused():
    model = TINY["bert"]()
    graph = through_torch_export(model)
    with pytest.raises(LeanError, match="takes attention_mask, input_ids, and this batch has input_ids: tokenise"):
        one = batch(model, 2, 5, True)
        stand_in = StandIn(graph, frozenset(one), model.config, torch.device("cpu"))
        stand_in(input_ids=one["input_ids"])


@onnx
def test_weights_that_the_runtime_cannot_multiply_are_refused():
    model = TINY["bert"]().to(torch.bfloat16)
    with pytest.raises(LeanError, match=r"holds bfloat16 weights.*load it with dtype='float32'"):
        prepare(model, Forward(), "onnxruntime")(batch(model, 2, 5, True))


class Choosing(torch.nn.Linear):
    """A linear that looks at its values before it decides."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input if input.sum().item() > 0 else -input)


class Bessel(torch.nn.Linear):
    """A linear with an operation that few formats know."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(super().forward(input))


@pytest.mark.parametrize(
    ("kind", "form", "why"),
    [
        (Choosing, "dynamo", "data-dependent"),
        pytest.param(Bessel, "onnx", "No ONNX function found", marks=onnx),
    ],
)
def test_the_layer_that_cannot_be_exported_is_named(kind, form, why, capfd):
    model = TINY["bert"](num_hidden_layers=2)
    model.bert.encoder.layer[1].output.dense = kind(64, 32)
    with pytest.raises(
        LeanError, match=rf"to {form} at bert.encoder.layer.1.output.dense, a {kind.__name__} \(.*{why}"
    ):
        export_model(model, Forward(), form, calibration=[batch(model, 2, 5, True)])
    assert capfd.readouterr() == ("", "")


def test_tasks_that_do_more_than_call_the_model_are_refused():
    class Twice:
        def forward(self, model: Any, batch: Any) -> Any:
            return model.embeddings(batch["input_ids"])

    class Never:
        def forward(self, model: Any, batch: Any) -> Any:
            return batch["input_ids"]

    with pytest.raises(LeanError, match="has no one graph"):
        call_of(Twice(), TINY["bert"](), batch(TINY["bert"](), 2, 5, True))
    with pytest.raises(LeanError, match="never calls the model"):
        call_of(Never(), TINY["bert"](), batch(TINY["bert"](), 2, 5, True))
