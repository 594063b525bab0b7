"""A kernel's second launch: of the form that was compiled for such arguments, and only for such."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from leanformers.kernels.launching import Launcher, on_device_of


class Kernel:
    """Counts how it is called: [grid](...) compiles, and what it gives back launches."""

    def __init__(self):
        names = {"x": False, "count": False, "B": True, "A": True}
        self.params = [SimpleNamespace(name=name, is_constexpr=constant) for name, constant in names.items()]
        self.found, self.launched = [], []

    def __getitem__(self, grid):
        def call(*arguments, **named):
            self.found.append((grid, arguments, named))
            return compiled

        class Compiled:
            def __getitem__(_, grid):
                return lambda *arguments: self.launched.append((grid, arguments))

        compiled = Compiled()
        return call


@pytest.fixture
def gpu(monkeypatch):
    device = SimpleNamespace(current=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device.current)
    return device


def test_the_second_launch_goes_past_triton(gpu):
    kernel, x = Kernel(), torch.zeros(8)
    launch = Launcher(kernel)
    for count in (3, 5):
        launch((count, 1, 1), (x, count), {"A": 16, "B": True}, num_warps=4)
    assert kernel.found == [((3, 1, 1), (x, 3), {"A": 16, "B": True, "num_warps": 4})]
    assert kernel.launched == [((5, 1, 1), (x, 5, True, 16))]  # constants in the kernel's own order


def test_what_triton_compiles_apart_is_kept_apart(gpu):
    kernel, x = Kernel(), torch.zeros(64)
    launch = Launcher(kernel)
    calls = [
        ((x, 3), {"A": 16, "B": True}, 4),
        ((x, 1), {"A": 16, "B": True}, 4),
        ((x, 48), {"A": 16, "B": True}, 4),
        ((x, 2**31 + 1), {"A": 16, "B": True}, 4),
        ((x, 3.0), {"A": 16, "B": True}, 4),
        ((x[1:], 3), {"A": 16, "B": True}, 4),
        ((x.half(), 3), {"A": 16, "B": True}, 4),
        ((None, 3), {"A": 16, "B": True}, 4),
        ((x, 3), {"A": 32, "B": True}, 4),
        ((x, 3), {"A": 16, "B": True}, 8),
    ]
    for again in (False, True):
        for arguments, constants, warps in calls:
            launch((1, 1, 1), arguments, constants, num_warps=warps)
        assert len(kernel.found) == len(calls) and len(kernel.launched) == again * len(calls)
    gpu.current = 1
    launch((1, 1, 1), *calls[0][:2], num_warps=4)
    assert len(kernel.found) == len(calls) + 1


def test_the_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernel = Kernel()
    launch = Launcher(kernel)
    for _ in range(2):
        launch((1, 1, 1), (torch.zeros(8), 3), {"A": 16, "B": True})
    assert len(kernel.found) == 2 and not kernel.launched


def test_a_tensor_on_the_current_device_needs_no_switch(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or on_device_of(torch.zeros(1)))
    for index in (0, 1):
        with on_device_of(SimpleNamespace(device=torch.device("cuda", index))):
            pass
    assert entered == [torch.device("cuda", 1)]
