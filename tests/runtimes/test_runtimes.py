"""Every runtime gives the model's answers; those that cannot run here say why."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from leanformers import runtimes
from leanformers.errors import LeanError
from leanformers.runtimes import available, prepare
from leanformers.runtimes import base as base_module
from leanformers.runtimes import compile as compile_module


class Classify:
    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


class Embed:
    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {k: batch[k].to(model.device) for k in ("input_ids", "attention_mask")}
        states = model.base_model(**inputs).last_hidden_state  # [batch, length, hidden_size]
        mask = inputs["attention_mask"][..., None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)


def bert(kind: Any = BertForSequenceClassification, width: int = 32) -> Any:
    torch.manual_seed(0)
    return kind(
        BertConfig(vocab_size=50, hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    )


def batch(rows: int, length: int, padded: bool = True) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(rows)}


def test_torch_is_exact_and_without_gradients():
    model = bert().train()
    prepared = prepare(model, Classify())
    assert not model.training
    out = prepared(batch(3, 8))
    assert torch.equal(out, Classify().forward(model, batch(3, 8)).detach())
    assert out.is_inference() and not out.requires_grad
    assert prepared.name == "torch" and "sdpa" in prepared.describe() and "float32" in prepared.describe()
    assert prepared.source is model


def test_names_and_refusals(monkeypatch):
    assert available()[0] == "torch"
    assert set(runtimes.runtimes()) >= {"torch", "torch-compile"}
    assert all(entry.summary for entry in runtimes.runtimes().values())
    with pytest.raises(LeanError, match="no runtime 'abacus'; choose one of torch, torch-compile"):
        prepare(bert(), Classify(), "abacus")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compile_module.shutil, "which", lambda name: None)
    assert "torch-compile" not in available()
    with pytest.raises(LeanError, match=r"needs a C\+\+ compiler.*install g\+\+"):
        prepare(bert(), Classify(), "torch-compile")
    monkeypatch.setenv("CXX", "nothing-of-the-kind")
    with pytest.raises(LeanError, match="'nothing-of-the-kind' that CXX names"):
        prepare(bert(), Classify(), "torch-compile")


def test_missing_headers_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(compile_module.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(compile_module.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(LeanError, match="python3-dev"):
        prepare(bert(), Classify(), "torch-compile")


def test_a_runtime_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr(base_module, "_RUNTIMES", dict(base_module._RUNTIMES))

    @runtimes.runtime("twice")
    def twice(model: Any, task: Any) -> Any:
        """Twice the answer."""
        plain = prepare(model, task)
        return runtimes.Prepared(name="twice", call=lambda b: 2 * plain(b), device=plain.device, source=model)

    model = bert()
    assert "twice" in available() and runtimes.runtimes()["twice"].summary == "Twice the answer."
    once, double = prepare(model, Classify()), prepare(model, Classify(), "twice")
    assert torch.equal(double(batch(2, 5)), 2 * once(batch(2, 5)))
    with pytest.raises(ValueError, match="registered twice"):
        runtimes.runtime("twice")(twice)


compiles = pytest.mark.skipif("torch-compile" not in available(), reason="needs a C++ compiler")


@compiles
@pytest.mark.slow
def test_compiled_agrees_on_other_sizes():
    model = bert()
    compiled, plain = prepare(model, Classify(), "torch-compile"), prepare(model, Classify())
    for one in (batch(3, 8), batch(4, 13), batch(2, 21, padded=False), batch(1, 5, padded=False)):
        torch.testing.assert_close(compiled(one), plain(one), rtol=1e-4, atol=1e-6)
    assert "shapes dynamic" in compiled.describe()


@compiles
def test_many_models_of_a_class_have_a_cache_each(monkeypatch):
    """Dynamo's own limit is per code object, which all of them share; beyond it they would run uncompiled."""
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    monkeypatch.setattr(compile_module.torch, "compile", partial(torch.compile, backend="eager"))
    before = counters["stats"]["unique_graphs"]
    with config.patch(recompile_limit=2):
        for width in (16, 32, 48, 64):
            model = bert(width=width)
            answer = prepare(model, Classify(), "torch-compile")(batch(3, 8))
            torch.testing.assert_close(answer, prepare(model, Classify())(batch(3, 8)), rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] - before >= 4


@compiles
def test_what_a_task_reaches_for_is_compiled_too(monkeypatch):
    """An embedder is called through `model.base_model`: there must be a graph of it, no eager detour."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(compile_module.torch, "compile", partial(torch.compile, backend="eager"))
    model = bert(BertModel)
    before = counters["stats"]["unique_graphs"]
    answer = prepare(model, Embed(), "torch-compile")(batch(3, 9))
    torch.testing.assert_close(answer, prepare(model, Embed())(batch(3, 9)), rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] > before
    assert not counters["graph_break"]
