"""Exporters kept from talking, to the terminal and over the network."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """No progress, no log, no warnings: packages on the way tell of their plans, and print graphs that failed.

    OpenVINO and NNCF besides report each conversion to a web service without asking. They leave it on a test
    server, by the variable CI, which is therefore set meanwhile.
    """
    disabled, server = logging.root.manager.disable, os.environ.get("CI")
    logging.disable(logging.ERROR)
    os.environ["CI"] = "true"
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if server is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = server
