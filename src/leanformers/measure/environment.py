"""The machine and the versions that a measurement was made with.

No format is assumed to be fast anywhere: whether int8 or bf16 pays depends on the instruction sets named
here. Nothing that names a person or a place (host name, user, paths) is read.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

# what `/proc/cpuinfo` calls it -> what we call it; x86 first, then Arm
_INSTRUCTIONS = {
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "asimddp": "neon_dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
}
_PACKAGES = ("torch", "transformers", "torchao", "peft", "optuna", "datasets", "leanformers")


def environment() -> dict[str, Any]:
    """{"hardware": …, "versions": …, "commit": … or None}, plain values that go into JSON.

    hardware: cpu, instruction_sets (those that matter here), cpu_capability (what torch uses), cores (this
    process may use), threads (torch uses), memory (bytes), gpus (names), system. commit: of the leanformers
    checkout, with "+changes" where it has uncommitted ones.
    """
    import torch

    hardware = {
        "cpu": cpu_model(),
        "instruction_sets": instruction_sets(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory": ram(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}",
    }
    return {"hardware": hardware, "versions": versions(), "commit": commit()}


def describe(env: dict[str, Any] | None = None) -> str:
    """One line of `environment()` for a report."""
    hardware = (env or environment())["hardware"]
    sets = ", ".join(hardware["instruction_sets"]) or "no vector extension known"
    gpus = "".join(f"; {name}" for name in hardware["gpus"])
    threads = f"{hardware['threads']} thread{'s' if hardware['threads'] != 1 else ''}"
    return f"{hardware['cpu']} ({sets}), {threads} on {hardware['cores']} cores{gpus}"


@cache
def _cpuinfo() -> dict[str, str]:
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines()) if v}
    return {}


def cpu_model() -> str:
    """Name of the processor, as the system gives it."""
    named = _cpuinfo().get("model name") or _cpuinfo().get("Model")
    if not named and platform.system() == "Darwin":
        named = _output("sysctl", "-n", "machdep.cpu.brand_string")
    return named or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Those of this processor's vector and matrix extensions that decide which number format is fast."""
    flags = set((_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split())
    return [ours for theirs, ours in _INSTRUCTIONS.items() if theirs in flags]


def cores() -> int:
    """Cores that this process may use (the whole machine's where the system does not say)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ram() -> int | None:
    """Bytes of main memory, or None where the system does not say."""
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@cache
def commit() -> str | None:
    """Commit of the checkout that leanformers is imported from; None when it is installed as a package."""
    here = Path(__file__).resolve().parents[1]
    top = _output("git", "-C", str(here), "rev-parse", "--show-toplevel")
    if not top or not (Path(top) / "src" / "leanformers").is_dir():
        return None  # a package inside somebody else's checkout
    sha = _output("git", "-C", str(here), "rev-parse", "HEAD")
    if not sha or not re.fullmatch(r"[0-9a-f]{40,64}", sha):
        return None
    changed = _output("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no")
    return f"{sha}+changes" if changed else sha


def _output(*command: str) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None
