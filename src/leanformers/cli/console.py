"""What is printed where: results to stdout, progress and errors to stderr, others' chatter nowhere."""

from __future__ import annotations

import logging
import os
import warnings
from functools import cache
from typing import Any

from rich.console import Console


@cache
def out() -> Console:
    """The console of results."""
    return Console(highlight=False)


def quiet() -> bool:
    """Whether progress is unwanted."""
    return logging.getLogger("leanformers").level > logging.WARNING


def set_up(*, quiet: bool = False, verbose: bool = False) -> None:
    """Show leanformers' own progress, and silence what the packages below it say of their business."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not verbose:
        warnings.filterwarnings("ignore")
        for name in ("torchao", "torch.utils._pytree"):  # of kernels for other machines, of their own plans
            logging.getLogger(name).setLevel(logging.ERROR)
    logger = logging.getLogger("leanformers")
    logger.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.WARNING)
    if not any(getattr(handler, "_leanformers", False) for handler in logger.handlers):
        logger.addHandler(_handler())
        logger.propagate = False


def silence_transformers() -> None:
    """Once a command loads models anyway: no bars for each file that is read or written."""
    from transformers.utils import logging as chatter

    chatter.set_verbosity_error()
    chatter.disable_progress_bar()


def _handler() -> Any:
    from rich.logging import RichHandler

    handler = RichHandler(
        console=Console(stderr=True, highlight=False),
        show_path=False,
        show_level=False,
        log_time_format="%H:%M:%S",
        rich_tracebacks=False,
    )
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler._leanformers = True  # type: ignore[attr-defined]
    return handler
