"""Every compressing method after every other: a model that reloads to the bit, or one sentence that says why not.

There is no third outcome. Methods come from the registry; each needs a line in `SETTINGS`.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from subjects import BOTH
from test_edit_laws import keep, reload

from leanformers.execute import execute
from leanformers.methods import Subject, methods
from leanformers.training.capture import fingerprint

SETTINGS: dict[str, dict[str, Any]] = {
    "axformer": {"k": 8, "neuron_group": 32, "samples": 8, "agreement": 0.0},
    "drop-layers": {"keep": 0.67},
    "dsformer": {"ratio": 1.5, "width": 16, "nonzeros": 2, "iterations": 1, "epochs": 1.0, "limit": 8, "batch_size": 4},
    "essential-sparsity": {"sparsity": 0.5},
    "fusegpt": {
        "group": 3,
        "rank": 2,
        "adapter_rank": 2,
        "samples": 8,
        "score_samples": 2,
        "batch_size": 2,
        "epochs": 1,
    },
    "greenformers": {"rank": 0.6, "multiple": 1},
    "idt5": {"coverage": 0.95},
    "obert": {"gradients": 4, "gradient_batch": 2},
    "optin": {"budget": 0.5, "samples": 8, "rows": 16, "neuron_group": 16},
    "quantization": {"embeddings": True},
    "slicegpt": {"slice": 0.25, "samples": 8},
    "vtrans": {"target": 0.2, "variant": "faster", "limit": 8},
}
"""Small settings that do change a tiny model."""

COMPRESS = sorted(
    slug for slug, info in methods().items() if info.cls.__module__.startswith("leanformers.methods.compress.")
)
PAIRS = [(make, first, second) for make in BOTH for first in COMPRESS for second in COMPRESS]


def treated(subject: Subject, slug: str) -> Subject | str:
    """The subject after the method, or the sentence with which it was refused before any work."""
    assert slug in SETTINGS, f"method {slug!r} is new: give it small settings in SETTINGS of {Path(__file__).name}"
    reason = methods()[slug].unsuitable(subject.anatomy, subject.task, SETTINGS[slug])
    return reason or execute([{"method": slug, **SETTINGS[slug]}], subject)


def untouched(make: str) -> Subject:
    return BOTH[make](initializer_range=0.2)


@cache
def alone(make: str, slug: str) -> Subject | str:
    return treated(untouched(make), slug)


@cache
def outcome(make: str, first: str, second: str) -> Subject | str:
    """Of a pair. What refuses the untouched model refuses the pair."""
    done = alone(make, first)
    if isinstance(done, str):
        return done
    return treated(Subject(**{**vars(done), "model": copy.deepcopy(done.model), "notes": {}}), second)


@pytest.mark.parametrize("slug", COMPRESS)
def test_every_method_has_settings_here_that_change_a_tiny_model(slug):
    results = {make: alone(make, slug) for make in BOTH}
    done = {make: one for make, one in results.items() if isinstance(one, Subject)}
    assert done, results
    for make, one in done.items():
        assert fingerprint(one.model) != fingerprint(untouched(make).model), f"the {make} is as it was"


@pytest.mark.parametrize(("make", "first", "second"), PAIRS)
def test_a_pair_gives_a_model_or_one_sentence(make, first, second):
    found = outcome(make, first, second)
    if isinstance(found, str):
        named = any(f"method '{slug}' does not suit this model: " in found for slug in (first, second))
        assert named and "\n" not in found and len(found) < 400, found


@pytest.mark.slow
def test_every_pair_reloads_to_the_bit_in_a_new_process(tmp_path, fresh):
    for make, first, second in PAIRS:
        found = outcome(make, first, second)  # from the test above, where the same process ran it
        if isinstance(found, Subject):
            keep(found.model, make, tmp_path / f"{make}-{first}-{second}")
    assert reload(tmp_path, fresh) == {}
