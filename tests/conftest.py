"""What all tests share: a quiet, offline, reproducible process."""

from __future__ import annotations

import os

# Before any test imports the packages that read these.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.path.exists("/dev/nvidiactl"):  # no GPU: kernels run in the interpreter, which torch's import would rule out
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gc
import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

gc.set_threshold(20_000)  # else two fifths of the time that imports take goes into looking for garbage among them


_frozen = 0  # modules that were loaded when the collector last looked away


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Keeps loaded packages out of the collector's sight.

    Searches, measurements, trainings and exports each collect garbage, and would walk every object of torch,
    transformers and all test modules each time, for most of a second.
    """
    global _frozen
    if len(sys.modules) >= _frozen + 50:
        _frozen = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers whatever ran before; torch only where it is loaded anyway."""
    random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """The command line changes the logger of the whole process: put it back."""
    logger = logging.getLogger("leanformers")
    before = (logger.level, list(logger.handlers), logger.propagate)
    yield
    logger.setLevel(before[0])
    logger.handlers[:] = before[1]
    logger.propagate = before[2]


@pytest.fixture(scope="session")
def fresh() -> Iterator[Any]:
    """Runs scripts in processes that never heard of leanformers, in a fraction of the time that starting them takes."""
    from fresh import Fresh

    made = Fresh()
    yield made
    made.close()


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT
