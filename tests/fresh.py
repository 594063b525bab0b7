"""Processes that never heard of leanformers, without the seconds that each takes to import transformers.

One server imports what every folder is opened with, and forks for each script or code that it is asked to run. Run as
a script it is that server; `Fresh` is its client.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


class Fresh:
    """Runs `[sys.executable, script, *arguments]`, or code after `-c`, as `subprocess.run` with `capture_output` and
    `text` would."""

    def __init__(self) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen([sys.executable, __file__], **pipes)

    def run(
        self, command: list[str], *, capture_output: bool, text: bool, cwd: Any = None
    ) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable and capture_output and text
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as place:
            asked = {"place": place, "cwd": str(cwd or Path.cwd()), "command": command[1:]}
            self._server.stdin.write(json.dumps(asked) + "\n")
            self._server.stdin.flush()
            code = int(self._server.stdout.readline())
            out, error = (Path(place, name).read_text() for name in ("out", "error"))
        return subprocess.CompletedProcess(command, code, out, error)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)


def serve() -> None:
    gc.disable()  # the imports leave no garbage
    import safetensors.torch
    import torch
    import transformers

    for name in ("onnxruntime", "onnxscript", "openvino", "transformers.exporters"):
        with contextlib.suppress(ImportError):  # what is not installed here no script will ask for
            importlib.import_module(name)
    assert safetensors.torch and torch and transformers.PreTrainedModel and "leanformers" not in sys.modules
    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, name in ((1, "out"), (2, "error")):
                os.dup2(os.open(Path(asked["place"], name), os.O_WRONLY | os.O_CREAT), number)
            os.chdir(asked["cwd"])
            sys.argv = asked["command"]
            code = 0
            try:
                if sys.argv[0] == "-c":
                    exec(sys.argv.pop(1), {"__name__": "__main__"})
                else:
                    runpy.run_path(sys.argv[0], run_name="__main__")
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)


if __name__ == "__main__":
    serve()
