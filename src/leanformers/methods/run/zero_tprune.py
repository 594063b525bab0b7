"""Zero-TPrune: drop tokens that the attention graph finds unimportant or doubled, in a model as it is.

Source: Wang, Dedhia, Jha (CVPR 2024, arXiv 2305.17328). After some layers, tokens vote along that layer's attention
(weighted PageRank per head, heads joined by the root of their mean square, flat and peaked heads left out); copies
among the less important half go first, then the least important. Nothing is trained, and no weight changes.
Choices where the paper is silent (the card): variances are of importance scaled to mean 1; votes among survivors run on
rows that sum to 1 again; features are the keys of all heads side by side. The schedule has the shape of the authors'
for 12 layers and 197 tokens (after layers 1, 3, 6, 9, 11; 30, 5, 5, 1, 1 votes), stretched to the depth, and one
strength scales all its cuts until the layers' FLOPs, the scoring included, are the share that is asked for. ``trials``
draws schedules at that share instead and keeps the one whose outputs stay nearest to the whole model's on calibration
data (the paper ranks them by accuracy). In texts, an extension of the paper's images, padding has no vote and the last
token, [SEP], stays.
Cost: attention probabilities are written out, in float32, in the layers that score, and each vote reads them once:
memory traffic and launches that FLOPs do not show. On a GPU kernels (`leanformers.kernels.token_votes`) choose without
writing them out, among up to 256 tokens. Even so a fast GPU gains little from it in half precision at DeiT's sizes, and
nothing where the dense model is compiled (evidence `zero-tprune-gpu`): measure before you serve it there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.methods.base import Choice, Range, Saving, Subject, method, setting
from leanformers.surgery import ReduceTokens
from leanformers.surgery.edits.reduce_tokens import refusal, set_default

_LAYERS, _TOKENS = 12, 197  # of the model that the schedule was made for
_AFTER, _VOTES = (1, 3, 6, 9, 11), (30, 5, 5, 1, 1)
_COPIES, _CUTS = (10, 10, 10, 10, 10), (0.0, 0.1, 0.2, 0.3, 0.0)
_LEAST = 0.05  # share of the tokens that a layer always keeps
_PATIENCE = 10  # draws for each trial
_STEPS = 40  # of the bisection


@dataclass(frozen=True)
class Schedule:
    """One row per place: after which layer (index), votes, and at strength 1 the share of the input's tokens that are
    dropped as copies and the share of the rest that is cut."""

    layers: tuple[int, ...]
    votes: tuple[int, ...]
    copies: tuple[float, ...]
    cuts: tuple[float, ...]

    def settings(self, strength: float, tokens: int) -> dict[str, Any]:
        """Of the rule ``page_rank``, with all cuts times the strength."""
        keep = [max(_LEAST, 1.0 - strength * cut) for cut in self.cuts]
        drop = [round(min(0.5, strength * share) * tokens) for share in self.copies]
        return {"keep": keep, "drop": drop, "votes": list(self.votes)}


def stretched(layers: int) -> Schedule:
    """The authors' schedule for another depth; where two fall on one layer it takes the larger cuts."""
    rows: dict[int, tuple[int, float, float]] = {}
    for after, votes, copies, cut in zip(_AFTER, _VOTES, _COPIES, _CUTS, strict=True):
        index = min(max(1, round(after * layers / _LAYERS)), layers - 1) - 1
        before = rows.get(index, (votes, 0.0, 0.0))
        rows[index] = (before[0], max(before[1], copies / _TOKENS), max(before[2], cut))
    found = rows.values()
    return Schedule(tuple(rows), *(tuple(row[column] for row in found) for column in range(3)))  # type: ignore[arg-type]


def drawn(layers: int, dice: random.Random) -> Schedule:
    """A random schedule over all layers but the last; most places do nothing."""
    every = range(layers - 1)
    chosen = set(dice.sample(every, dice.randint(1, min(5, layers - 1))))
    third = layers / 3
    votes = [dice.choice((30, 50) if index < third else (5, 10) if index < 2 * third else (1,)) for index in every]
    copies = [dice.uniform(0.0, 0.1) if index in chosen else 0.0 for index in every]
    cuts = [dice.uniform(0.05, 0.4) if index in chosen else 0.0 for index in every]
    return Schedule(tuple(every), tuple(votes), tuple(copies), tuple(cuts))


@method("zero-tprune", stock=False, stage="quantise", order=50, paper="Wang, Dedhia, Jha (2024)")
@dataclass(frozen=True, kw_only=True)
class ZeroTPrune:
    """Drop unimportant and doubled tokens between layers, without training."""

    flops: float = setting(0.65, low=0.05, high=1.0, help="share of the layers' FLOPs that stays, scoring included")
    length: int | None = setting(None, low=4, help="tokens the share holds for; null: of an image all, of a text 128")
    uniform: bool = setting(False, help="first votes alike, not more for the class token")
    trials: int = setting(0, low=0, help="random schedules tried on calibration data; 0: the authors' schedule")
    samples: int = setting(64, low=1, help="calibration rows of the trials")

    def __call__(self, subject: Subject) -> None:
        anatomy = subject.anatomy
        if not self.trials:
            edit = self._edit(anatomy)
            subject.apply(edit)
        else:
            edit = self._search(subject)
        subject.notes["zero-tprune"] = {"layers": list(edit.layers), **edit.settings}

    def _search(self, subject: Subject) -> ReduceTokens:
        """Apply the best of the drawn schedules."""
        anatomy, dice = subject.anatomy, random.Random(subject.seed)
        batches = list(subject.calibration(self.samples))
        whole = _outputs(subject, batches)
        edits: list[ReduceTokens] = []
        for _ in range(_PATIENCE * self.trials):  # one too weak for the share is drawn anew
            if len(edits) < self.trials:
                with suppress(LeanError):
                    edits.append(self._edit(anatomy, drawn(anatomy.num_hidden_layers, dice)))
        if not edits:
            raise LeanError(f"No schedule that was drawn leaves only {self.flops} of the FLOPs; raise flops.")
        subject.apply(edits[0])
        errors = []
        for edit in edits:
            set_default(subject.model, **edit.settings)
            errors.append(distance(_outputs(subject, batches), whole))
        best = min(range(len(edits)), key=errors.__getitem__)
        set_default(subject.model, **edits[best].settings)
        return edits[best]

    def _edit(self, anatomy: Anatomy, schedule: Schedule | None = None) -> ReduceTokens:
        """The edit whose FLOPs come nearest to the share from below.

        Raises:
            LeanError: the model drops no tokens, or the schedule cannot go so far.
        """
        tokens = self.tokens(anatomy)
        schedule = schedule or stretched(anatomy.num_hidden_layers)
        start = "uniform" if self.uniform else "class"

        def at(strength: float) -> ReduceTokens:
            settings = {**schedule.settings(strength, tokens), "start": start, "keep_last": anatomy.is_text}
            return ReduceTokens(layers=schedule.layers, rule="page_rank", settings=settings)

        if (reason := refusal(anatomy)) is not None:
            raise LeanError(reason)
        whole = anatomy.layer_flops(tokens)

        def share(strength: float) -> float:
            return 1.0 + at(strength).cost(anatomy).flops(tokens) / whole

        low, high = 0.0, 1.0 / max(*schedule.cuts, 1e-3)
        if self.flops == 1.0:
            return at(0.0)
        if (least := share(high)) > self.flops:
            raise LeanError(f"At {tokens} tokens its schedule leaves {least:.2f} of the FLOPs at least; raise flops.")
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if share(middle) <= self.flops else (middle, high)
        return at(high)

    def tokens(self, anatomy: Anatomy) -> int:
        """Tokens that the share of FLOPs is meant for."""
        if self.length is not None:
            return self.length
        table: Any = dict(anatomy.base.named_parameters()).get("embeddings.position_embeddings")
        return 128 if table is None else int(table.shape[1])

    def refuses(self, anatomy: Anatomy, task: Any) -> str | None:
        if task is not None and task.kind == "embedding":
            return "a text's vector is the mean of all its tokens, and some would be missing"
        if anatomy.num_hidden_layers < 2:
            return "it has one layer, and tokens are dropped between layers"
        if self.trials and task is None:
            return "trials need calibration data; give a task, or set trials to 0"
        try:
            self._edit(anatomy).cost(anatomy)
        except LeanError as error:
            return str(error).rstrip(".")
        return None

    def estimate(self, anatomy: Anatomy, length: int = 128) -> Saving:
        return Saving(
            flops=self._edit(anatomy).cost(anatomy).flops(length if anatomy.is_text else self.tokens(anatomy))
        )

    @classmethod
    def space(cls) -> dict[str, Choice | Range]:
        return {"flops": Choice((0.5, 0.65, 0.8))}

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return []  # in the evidence random dropping lost less: a search tries it where it is named


@torch.inference_mode()
def _outputs(subject: Subject, batches: Sequence[dict[str, Any]]) -> Tensor:
    subject.model.eval()
    return torch.cat([subject.task.forward(subject.model, batch).float().cpu() for batch in batches])


def distance(found: Tensor, whole: Tensor) -> float:
    """Of outputs [rows, classes] from the whole model's: divergence of the classes, of a single output the square."""
    if found.shape[-1] == 1:
        return float((found - whole).square().mean())
    return float(
        functional.kl_div(found.log_softmax(-1), whole.log_softmax(-1), log_target=True, reduction="batchmean")
    )
