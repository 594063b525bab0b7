"""Peak memory sees what is allocated while running, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leanformers.measure import memory
from leanformers.measure.memory import cpu_rise, peak_memory

MEGABYTE = 1 << 20


def touch(megabytes: int) -> None:
    torch.ones(megabytes * MEGABYTE // 4)


@pytest.mark.skipif(memory._status("VmRSS") is None, reason="needs Linux")
@pytest.mark.parametrize("sampled", [False, True])
def test_the_rise_is_the_largest_allocation(monkeypatch, sampled):
    if sampled:
        monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    kept = torch.ones(64 * MEGABYTE // 4)  # held before: not counted

    def run() -> None:
        for size in (32, 128, 64):
            touch(size)

    rise = cpu_rise(run)
    assert rise is not None and 100 * MEGABYTE < rise < 160 * MEGABYTE
    assert kept.numel()


@pytest.mark.skipif(memory._status("VmRSS") is None, reason="needs Linux")
def test_a_run_before_does_not_count():
    touch(256)
    rise = cpu_rise(lambda: touch(8))
    assert rise is not None and rise < 40 * MEGABYTE


@pytest.mark.skipif(memory._status("VmRSS") is None, reason="needs Linux")
def test_the_model_itself_counts():
    model = nn.Linear(1024, 1024, bias=False)
    peak = peak_memory(lambda: None, model)
    assert peak is not None and 4 * MEGABYTE <= peak < 6 * MEGABYTE


def test_none_where_the_system_does_not_say(monkeypatch):
    monkeypatch.setattr(memory, "_status", lambda name: None)
    assert peak_memory(lambda: None, nn.Linear(2, 2)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_rise_on_a_gpu():
    device = torch.device("cuda")
    model = nn.Linear(1024, 1024, bias=False, device=device)
    peak = peak_memory(lambda: torch.empty(16 * MEGABYTE, dtype=torch.uint8, device=device), model, device)
    assert peak == 20 * MEGABYTE
