"""The environment is plain data and names what decides which format is fast."""

from __future__ import annotations

import getpass
import json
import socket

from leanformers.measure import environment as measure_environment
from leanformers.measure.environment import cores, describe, environment, instruction_sets


def test_it_is_json_and_complete():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] and found["versions"]["transformers"] and found["versions"]["python"]
    hardware = found["hardware"]
    assert hardware["cpu"] and hardware["cores"] >= 1 and hardware["threads"] >= 1
    assert isinstance(hardware["instruction_sets"], list)
    assert measure_environment() == found


def test_it_names_nobody():
    text = json.dumps(environment())
    assert socket.gethostname() not in text
    assert f"/{getpass.getuser()}" not in text


def test_instruction_sets_are_read_from_the_flags(monkeypatch):
    module = __import__("leanformers.measure.environment", fromlist=["_cpuinfo"])
    flags = "fpu sse2 avx2 avx512f avx512_vnni amx_tile amx_int8"
    monkeypatch.setattr(module, "_cpuinfo", lambda: {"flags": flags})
    assert instruction_sets() == ["avx2", "avx512f", "avx512_vnni", "amx", "amx_int8"]
    monkeypatch.setattr(module, "_cpuinfo", lambda: {"Features": "fp asimd asimddp i8mm bf16"})
    assert instruction_sets() == ["neon", "neon_dotprod", "i8mm", "bf16"]
    monkeypatch.setattr(module, "_cpuinfo", dict)
    assert instruction_sets() == []


def test_description_is_one_line():
    assert "\n" not in describe() and f"{cores()} cores" in describe()


def test_commit_is_none_outside_a_checkout(monkeypatch):
    module = __import__("leanformers.measure.environment", fromlist=["commit"])
    monkeypatch.setattr(module, "_output", lambda *command: None)
    assert module.commit.__wrapped__() is None
    answers = {"--show-toplevel": "/nowhere"}
    monkeypatch.setattr(module, "_output", lambda *command: answers.get(command[-1]))
    assert module.commit.__wrapped__() is None
