"""Rebuilding a tokenizer from the kept part of its `tokenizer.json`."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from leanformers.errors import LeanError
from leanformers.surgery.tokenizers.backend import Backend, template_ids
from leanformers.surgery.tokenizers.closure import Closure, indices, merged

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
# Vocabularies of slow tokenizers, which hold the old ids.
SLOW_FILES = (
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
    *("added_tokens.json", "special_tokens_map.json"),
)
# What users set on a loaded tokenizer, and what its own files do not always say.
SETTINGS = (
    "padding_side",
    "truncation_side",
    "model_max_length",
    "model_input_names",
    "clean_up_tokenization_spaces",
)
logger = logging.getLogger(__name__)


def trim(tokenizer: PreTrainedTokenizerBase, keep: Tensor | Sequence[int]) -> PreTrainedTokenizerFast:
    """Cut a fast tokenizer down to the kept ids; the new id of a token is its position in keep.

    keep: strictly increasing old ids, closed (see close). Scores and the order of merges stay, as do
    normaliser, pre-tokeniser, decoder, templates, padding, truncation and chat template. A text whose old ids
    all lie in keep is encoded as before, renumbered. The result has the class of the old tokenizer where that
    class loads `tokenizer.json` faithfully, else the generic one.
    LeanError: a tokenizer that cannot be cut; keep unsorted, with ids that are no tokens, or not closed.
    """
    backend = Backend.of(tokenizer)
    ids = indices(backend, keep)
    if any(left >= right for left, right in pairwise(ids)):
        raise LeanError("keep must be strictly increasing, as the order of tokens must not change: sort it")
    if missing := Closure(backend).missing(set(ids)):
        first = f"{min(missing)} ({backend.tokens[min(missing)]!r})"
        raise LeanError(
            f"keep lacks {len(missing)} ids that {backend.name} needs, first {first}: close(tokenizer, keep)"
        )
    return _reload(tokenizer, cut(backend, ids))


def cut(backend: Backend, keep: Sequence[int]) -> dict[str, Any]:
    """The `tokenizer.json` of the kept ids, which must be closed."""
    spec = json.loads(json.dumps(backend.spec))
    new = {old: index for index, old in enumerate(keep)}
    model = spec["model"]
    if backend.kind == "Unigram":
        model["vocab"] = [row for index, row in enumerate(model["vocab"]) if index in new]
        model["unk_id"] = new.get(model["unk_id"])
    else:
        vocab = model["vocab"] = {token: new[index] for token, index in model["vocab"].items() if index in new}
    if backend.kind == "BPE":
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if left in vocab and right in vocab and merged(backend, left, right) in vocab
        ]
    spec["added_tokens"] = [token | {"id": new[token["id"]]} for token in spec["added_tokens"]]
    for place, at in template_ids(spec):
        place[at] = new[place[at]]
    if spec["padding"] is not None:
        spec["padding"]["pad_id"] = new[spec["padding"]["pad_id"]]
    return spec


def save(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """`save_pretrained`, and no vocabulary of another tokenizer left beside it in the folder."""
    tokenizer.save_pretrained(folder)
    own = type(tokenizer).vocab_files_names
    names = [*SLOW_FILES, *(own[kind] for kind in ("vocab_file", "merges_file") if kind in own)]
    for name in set(names) - {TOKENIZER_FILE}:
        Path(folder, name).unlink(missing_ok=True)


def _reload(tokenizer: PreTrainedTokenizerBase, spec: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A tokenizer of the given `tokenizer.json` and the old settings, loaded as users will load it.

    Through files, because classes keep ids of their own (language codes, prefixes) that only loading sets.
    """
    from transformers import PreTrainedTokenizerFast

    own: Any = type(tokenizer)
    for kind in dict.fromkeys((own, PreTrainedTokenizerFast)):
        with TemporaryDirectory() as folder:
            save(tokenizer, folder)
            Path(folder, TOKENIZER_FILE).write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
            if kind is not own:
                _write_settings(tokenizer, Path(folder, CONFIG_FILE))
            new = kind.from_pretrained(folder)
        if _same(spec, json.loads(new.backend_tokenizer.to_str())):
            break
        logger.info("%s does not load the cut tokenizer.json faithfully", kind.__name__)
    else:
        raise LeanError(f"{own.__name__} does not load its cut tokenizer.json again: leave it whole")
    new.name_or_path = new.init_kwargs["name_or_path"] = tokenizer.name_or_path
    for setting in SETTINGS:
        setattr(new, setting, getattr(tokenizer, setting))
    return new


def _write_settings(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Make the class defaults explicit, for the generic class does not have them."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {setting: getattr(tokenizer, setting) for setting in SETTINGS}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


def _same(wanted: dict[str, Any], got: dict[str, Any]) -> bool:
    """Whether two tokenizers encode alike: all but padding and truncation, which every call sets anew.

    Scores may differ in their last digit, which the Rust reader of `tokenizer.json` sometimes misses.
    """
    one, two = ({key: spec[key] for key in wanted.keys() - {"padding", "truncation"}} for spec in (wanted, got))
    if wanted["model"]["type"] == "Unigram":
        rows = [spec["model"]["vocab"] for spec in (wanted, got)]
        if len(rows[0]) != len(rows[1]):
            return False
        for left, right in zip(*rows, strict=True):
            if left[0] != right[0] or not math.isclose(left[1], right[1], rel_tol=1e-15):
                return False
        one, two = ({**spec, "model": {**spec["model"], "vocab": None}} for spec in (one, two))
    return one == two
