"""Measurements as data: JSON and ratios."""

from __future__ import annotations

import dataclasses
import json

import pytest

from leanformers.errors import LeanError
from leanformers.measure import Measurement

BASE = Measurement(
    parameters=100,
    bytes=400,
    memory=400,
    quality=0.8,
    metric="accuracy",
    metrics={"accuracy": 0.8},
    flops=50.0,
    examples=10,
    tokens=100,
    latency=0.1,
    latency_p95=0.2,
    latency_ratio=1.0,
    latency_range=(1.0, 1.0),
    throughput=1000.0,
    peak_memory=800,
)


def test_json_round_trip():
    data = json.loads(json.dumps(BASE.to_json()))
    assert Measurement.from_json(data) == BASE
    assert Measurement.from_json(json.dumps(data)) == BASE


@pytest.mark.parametrize(
    ("change", "says"),
    [({"version": 99}, "version 99"), ({"colour": 1}, "'colour'"), ({"bytes": None}, None)],
)
def test_other_versions_and_fields_are_refused(change, says):
    data = BASE.to_json() | change
    if says is None:
        del data["bytes"]
        says = "'bytes'"
    with pytest.raises(LeanError, match=says):
        Measurement.from_json(data)


def test_ratios_to_itself_are_one():
    assert set(BASE.ratios(BASE).values()) == {1.0}
    assert {"quality", "latency", "bytes", "parameters", "flops", "memory"} <= set(BASE.ratios(BASE))


def test_what_was_not_measured_has_no_ratio():
    bare = Measurement(parameters=50, bytes=100, memory=100)
    assert bare.ratios(BASE) == {"parameters": 0.5, "bytes": 0.25, "memory": 0.25}


def test_quality_ratio_is_above_one_where_better():
    better = dataclasses.replace(BASE, quality=0.88)
    assert better.ratios(BASE)["quality"] == pytest.approx(1.1)
    base = dataclasses.replace(BASE, quality=1.0, better="lower")
    assert dataclasses.replace(base, quality=1.25).ratios(base)["quality"] == pytest.approx(0.8)


def test_latency_ratio_is_the_paired_one():
    own = dataclasses.replace(BASE, latency=0.07, latency_ratio=0.5)
    assert own.ratios(BASE)["latency"] == 0.5
    assert own.ratios(dataclasses.replace(BASE, latency_ratio=0.25))["latency"] == 2.0
    assert own.ratios(dataclasses.replace(BASE, latency_ratio=None))["latency"] == 0.5
    alone = dataclasses.replace(own, latency_ratio=None)
    assert alone.ratios(BASE)["latency"] == pytest.approx(0.7)


def test_flops_ratio_is_for_the_same_texts():
    longer = dataclasses.replace(BASE, tokens=200)  # its tokenizer cuts the same ten rows into twice the tokens
    assert longer.ratios(BASE)["flops"] == 2.0
    assert longer.ratios(BASE)["throughput"] == 0.5


def test_zero_baseline():
    zero = dataclasses.replace(BASE, quality=0.0)
    assert BASE.ratios(zero)["quality"] == float("inf")
    assert zero.ratios(zero)["quality"] == 1.0
