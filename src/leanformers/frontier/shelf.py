"""Models that a search keeps, so that recipes that begin alike train once: in memory, or in files for want of room.

A model of 7B parameters leaves no room for others beside the baseline and the one under work. What is kept is then
written as a checkpoint and read back when it is wanted: the same weights bit for bit, at the cost of the reading.
"""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from leanformers import folders
from leanformers.execute import save_checkpoint
from leanformers.frontier.deployed import passing
from leanformers.methods import Subject

_MOST = 3  # kept at all
_TRAINING = 16  # bytes per parameter of a training: float32 weights, gradients and two moments
_SMALL = 2**30  # bytes of a model that is kept in memory where the system does not say what is free


class Shelf:
    """Subjects by key, of a run folder; the oldest goes when there are too many.

    load: reads a checkpoint: folder -> (model on its device, tokenizer).
    """

    def __init__(self, folder: Path, load: Callable[[Path], tuple[Any, Any]]) -> None:
        self.folder, self.load = folder, load
        self._kept: OrderedDict[str, tuple[Subject, ExitStack, Path | None]] = OrderedDict()

    def take(self, key: str) -> Subject | None:
        """A copy of what is kept under that key, to work on; None where nothing is."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        kept, _, place = self._kept[key]
        if place is None:
            return _copy(kept)
        model, tokenizer = self.load(place)
        return replace(kept, model=model, tokenizer=tokenizer, notes=copy.deepcopy(kept.notes))

    def put(self, key: str, subject: Subject) -> Subject:
        """Keep a subject as it is now; returns the one to go on with."""
        while len(self._kept) >= _MOST:
            self._drop(next(iter(self._kept)))
        fits = roomy(subject.model)
        self._kept[key] = (subject, ExitStack(), None)
        if fits:
            return _copy(subject)
        self._write(key)
        return subject

    def make_room(self, model: Any) -> None:
        """Write kept models to files, the oldest first, until a copy of this model can be trained."""
        for key, (_, _, place) in list(self._kept.items()):
            if place is None and not roomy(model):
                self._write(key)

    def close(self) -> None:
        """Keep nothing any longer, and remove the files."""
        for key in list(self._kept):
            self._drop(key)

    def _write(self, key: str) -> None:
        subject, stack, _ = self._kept.pop(key)
        try:
            place = stack.enter_context(passing(self.folder))
            save_checkpoint(place, subject.model, subject.tokenizer, subject.task)
        except Exception as error:
            stack.close()
            if not folders.disk_full(error):
                raise
            return  # it is trained again when it is wanted
        bare = replace(subject, model=None, tokenizer=None, notes=copy.deepcopy(subject.notes))
        self._kept[key] = (bare, stack, place)

    def _drop(self, key: str) -> None:
        self._kept.pop(key)[1].close()
        free()


def _copy(subject: Subject) -> Subject:
    return replace(
        subject,
        model=copy.deepcopy(subject.model),
        tokenizer=copy.deepcopy(subject.tokenizer),
        notes=copy.deepcopy(subject.notes),
    )


def roomy(model: Any) -> bool:
    """Whether another copy of the model could be made and trained on its device beside all that is there now."""
    from leanformers.measure.cost import bytes_in_memory, parameters
    from leanformers.training.fisher import free_memory

    size = bytes_in_memory(model)
    needed = size + _TRAINING * parameters(model)
    for _ in range(2):
        left = free_memory(model.device)
        if left is None:
            return size <= _SMALL
        if left >= needed:
            return True
        free()
    return False


def groups(sizes: dict[str, int], device: Any) -> list[list[str]]:
    """Names of models in groups to be loaded together: as many as half of the free memory holds, one at least.

    sizes: bytes of each.
    """
    import torch

    from leanformers.training.fisher import free_memory

    free()
    left = free_memory(torch.device(device))
    room = _SMALL if left is None else left // 2
    found: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not found or held + size > room:
            found.append([])
            held = 0
        found[-1].append(name)
        held += size
    return found


@contextmanager
def settled() -> Iterator[None]:
    """Inside, collections pass over what is there now: they would walk the million objects of the libraries, for half a
    second each, and a search collects after every estimate. Nothing changes where the caller has frozen objects."""
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def free() -> None:
    """Give back what no variable names any more: an edited model is part of a cycle."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
