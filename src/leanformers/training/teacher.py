"""The teacher: its outputs on a task's examples, computed once and kept for every student.

Sentence-level outputs (class logits, numbers, embeddings) are stored per example in float16, in memory and,
with a folder, as safetensors files that later processes read. They are found again by the example's own
content, so that one store serves every `limit`, split and student. For language models the logits of a whole
vocabulary are too many to
keep: the teacher runs live beside the student, or stores its `top_k` logits per position and the sum of the
    others' probabilities (KL at temperature 1 only).
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanformers.errors import LeanError
from leanformers.training.batches import length_of
from leanformers.training.capture import Record, fingerprint, recording
from leanformers.training.distillation import TOKEN_KINDS
from leanformers.training.progress import bar

_log = logging.getLogger(__name__)
_FLUSH_SECONDS = 60.0
# Not seen by the model, so they do not distinguish a teacher's outputs.
_UNSEEN = ("labels", "bytes")

Stored = tuple[Tensor, ...]  # (outputs,) of an example, or (values, indices, rest) of its positions


class Teacher:
    """A model whose outputs students learn.

    Args:
        model: in use as it is; it must not be edited afterwards (give a deepcopy if the student is the same
            object).
        task, tokenizer: those the model was made for. A student with a cut vocabulary has a tokenizer of its
            own.
        folder: where stored outputs are kept between processes; None for memory only.
        top_k: for language models, store this many logits per position; None runs the teacher live.
        batch_size: of the forward passes that fill the store.
    """

    def __init__(
        self,
        model: Any,
        task: Any,
        tokenizer: Any,
        *,
        folder: str | os.PathLike[str] | None = None,
        top_k: int | None = None,
        batch_size: int = 32,
    ) -> None:
        if top_k is not None and (top_k < 1 or task.kind not in TOKEN_KINDS):
            raise LeanError(
                f"top_k={top_k} of a teacher is at least 1 and for language-modelling tasks, not {task.kind}."
            )
        self.model, self.task, self.tokenizer = model, task, tokenizer
        self.folder = None if folder is None else Path(folder)
        self.top_k = top_k
        self.batch_size = batch_size
        self._store: dict[bytes, Stored] = {}
        self._keys: dict[tuple[str, int | None], list[bytes]] = {}
        self._read: set[str] = set()
        self._fingerprint: str | None = None

    @property
    def stored(self) -> bool:
        """Whether outputs are computed once and kept; otherwise the teacher runs beside the student."""
        return self.top_k is not None or self.task.kind not in TOKEN_KINDS

    @property
    def fingerprint(self) -> str:
        """Hash of the model's weights and config, the task and top_k; taken once, at first use."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=16)
            for part in (
                fingerprint(self.model),
                self.model.config.to_json_string(),
                self.task.fingerprint,
                self.top_k,
            ):
                digest.update(f"{part}\n".encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def on(self, task: Any) -> Teacher:
        """The same teacher for another set of examples of its kind of task, with what it has stored so far."""
        other = copy.copy(self)
        other.task, other._keys, other._read, other._fingerprint = task, {}, set(), None
        return other

    def prepare(self, split: str = "train", limit: int | None = None, *, progress: Any = False) -> None:
        """Compute what the store lacks of the first `limit` rows of a split; nothing for a live teacher."""
        if not self.stored or (split, limit) in self._keys:
            return
        features = self.task.features(self.tokenizer, split, limit)
        keys = [_key(feature) for feature in features]
        self._load()
        missing = [index for index, key in enumerate(keys) if key not in self._store]
        missing.sort(key=lambda index: length_of(features[index]), reverse=True)
        with bar(progress, "Teacher", len(missing)) as advance:
            fresh: list[bytes] = []
            saved = time.monotonic()
            for indices in (missing[i : i + self.batch_size] for i in range(0, len(missing), self.batch_size)):
                chosen = [features[index] for index in indices]
                outputs, _ = self.live(self.task.collate(self.tokenizer, chosen))
                for index, output in zip(indices, self._compress(outputs, chosen), strict=True):
                    self._store[keys[index]] = output
                    fresh.append(keys[index])
                if time.monotonic() - saved > _FLUSH_SECONDS:
                    self._save(fresh)
                    fresh, saved = [], time.monotonic()
                advance(len(indices))
            self._save(fresh)
        self._keys[split, limit] = keys

    def outputs(
        self,
        index: Tensor | Sequence[int],
        split: str = "train",
        limit: int | None = None,
        *,
        length: int | None = None,
        device: Any = None,
    ) -> Any:
        """Stored outputs of examples, by their place in the split's features, after `prepare`.

        Returns float32 as Task.forward shapes it, or (values [batch, length, k], indices, rest [batch,
        length]) with top_k, padded to `length`.
        """
        keys = self._keys[split, limit]
        try:
            rows = [self._store[keys[i]] for i in (index.tolist() if isinstance(index, Tensor) else index)]
        except IndexError:
            raise LeanError(
                "The student's examples are not the teacher's: both need the same task, and stored top-k "
                "logits the same tokenizer."
            ) from None
        if self.top_k is None:
            stacked = torch.stack([row[0] for row in rows])  # [batch, texts per example, ...]
            return stacked.transpose(0, 1).flatten(0, 1).float().to(device)
        size = max(length or 0, max(len(row[0]) for row in rows))
        values, indices, rest = (
            torch.stack([torch.nn.functional.pad(row[part], _padding(row[part], size)) for row in rows])
            for part in range(3)
        )
        return values.float().to(device), indices.long().to(device), rest.float().to(device)

    def live(
        self,
        batch: dict[str, Any],
        *,
        token_map: Tensor | None = None,
        hidden: bool = False,
        attention: bool = False,
    ) -> tuple[Tensor, Record]:
        """Outputs and, where asked, inner states on a student's batch; no gradient, eval mode.

        token_map: [student's vocab], the teacher's id of each of the student's tokens. Input ids are
            translated, and logits over the vocabulary are reduced to the student's before any softmax.
        """
        if token_map is not None:
            batch = {**batch, "input_ids": token_map.to(batch["input_ids"].device)[batch["input_ids"]]}
        with (
            _evaluating(self.model),
            torch.no_grad(),
            recording(self.model, hidden=hidden, attention=attention) as record,
        ):
            outputs = self.task.forward(self.model, batch)
        if token_map is not None and self.task.kind in TOKEN_KINDS:
            outputs = outputs[..., token_map.to(outputs.device)]
        return outputs, record

    def token_map(self, tokenizer: Any) -> Tensor | None:
        """The teacher's id of each token of a student's tokenizer; None if the two agree.

        Raises:
            LeanError: the student has a token that the teacher lacks, so the two cannot be compared token by
            token.
        """
        if tokenizer is self.tokenizer:
            return None
        ours, theirs = tokenizer.get_vocab(), self.tokenizer.get_vocab()
        if ours == theirs:
            return None
        table = torch.zeros(max(ours.values()) + 1, dtype=torch.long)
        for token, index in ours.items():
            if token not in theirs:
                raise LeanError(
                    f"The student's tokenizer has the token {token!r} and the teacher's has not; distil "
                    "token by token only from a teacher with the same or a larger vocabulary."
                )
            table[index] = theirs[token]
        return table

    def _compress(self, outputs: Tensor, features: Sequence[dict[str, Any]]) -> Iterator[Stored]:
        if self.top_k is None:
            if self.task.kind == "text-classification":
                # A constant shift changes no softmax; near 0 float16 is finest.
                outputs = outputs - outputs.amax(-1, keepdim=True)
            # A pair gives two outputs, first all queries and then all bodies.
            grouped = outputs.view(-1, len(features), *outputs.shape[1:]).transpose(0, 1)
            for row in grouped.half().cpu():
                yield (row,)
            return
        for row, feature in zip(outputs, features, strict=True):
            log_probabilities = row[: len(feature["input_ids"])].float().log_softmax(-1)  # [length, vocab]
            values, indices = log_probabilities.topk(min(self.top_k, log_probabilities.shape[-1]), -1)
            rest = (1 - values.exp().sum(-1)).clamp(min=1e-7).log()
            yield values.half().cpu(), indices.int().cpu(), rest.half().cpu()

    # -- the folder ----------------------------------------------------------------------------------------

    def _directory(self) -> Path | None:
        return None if self.folder is None else self.folder / self.fingerprint

    def _load(self) -> None:
        directory = self._directory()
        if directory is None or not directory.is_dir():
            return
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        for path in sorted(directory.glob("*.safetensors")):
            if path.name in self._read:
                continue
            try:
                tensors = load_file(path)
            except (SafetensorError, OSError) as error:
                _log.warning("Stored teacher outputs %s cannot be read (%s); they are computed again.", path, error)
                continue
            self._read.add(path.name)
            lengths = tensors.pop("lengths", None)
            parts = [tensors[f"part{i}"] for i in range(len(tensors) - 1)]
            rows = [part.unbind() if lengths is None else part.split(lengths.tolist()) for part in parts]
            for key, *stored in zip(tensors["keys"], *rows, strict=True):
                self._store[key.numpy().tobytes()] = tuple(stored)

    def _save(self, keys: Sequence[bytes]) -> None:
        directory = self._directory()
        if directory is None or not keys:
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        rows = [self._store[key] for key in keys]
        tensors = {"keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1)}
        for part, column in enumerate(zip(*rows, strict=True)):
            tensors[f"part{part}"] = torch.stack(column) if self.top_k is None else torch.cat(column)
        if self.top_k is not None:
            tensors["lengths"] = torch.tensor([len(row[0]) for row in rows])
        name = f"{uuid.uuid4().hex}.safetensors"
        partial = directory / f"{name}.partial"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial)
            # A reader, or a kill, sees the whole file or none.
            os.replace(partial, directory / name)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise LeanError(
                f"The teacher's outputs cannot be written to {directory} ({error}); free some space or name "
                "another folder."
            ) from error
        self._read.add(name)


def _key(feature: dict[str, Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(feature):
        if name not in _UNSEEN:
            digest.update(f"{name}={feature[name]!r};".encode())
    return digest.digest()


def _padding(part: Tensor, size: int) -> tuple[int, ...]:
    """Arguments of `pad` that lengthen the first axis of [length] or [length, k]."""
    return (0, 0) * (part.dim() - 1) + (0, size - part.shape[0])


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
