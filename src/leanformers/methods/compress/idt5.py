"""Keep vocabulary: drop the tokens that a corpus does not use, from embeddings, head and tokenizer.

Source: idT5 (Fuadi, Wibawa, Sumpeno, 2023, arXiv 2302.00856), after D. Dale's recipe for mT5 (2021) and
"Load What You Need" (Abdaoui et al., 2020). Count the corpus with the old tokenizer, keep what covers it and
what the tokenizer needs besides, and slice. No layer changes: a text whose tokens are all kept gives the same
hidden states.
Deviations: the vocabulary is chosen by coverage rather than as the 30,000 commonest tokens; the first 1,000
ids do not stay as such, since specials, characters, bytes and derivations do; sizes are multiples of 64.
Cost: a row dropped saves hidden_size parameters (twice that if the head is not tied) and, where there is a
language-modelling head, 2 hidden_size FLOPs per token. No training. Texts unlike the corpus take more tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from leanformers.errors import LeanError
from leanformers.methods.base import Choice, Range, Saving, Subject, method, setting
from leanformers.surgery import KeepVocabulary
from leanformers.surgery.tokenizers import choose, close, count, trim

TEXT_KINDS = ("text-classification", "text-regression", "embedding", "causal-lm", "masked-lm")
# What 99.9% coverage of English technical text leaves of a vocabulary of 30,000 to 50,000, roughly.
TYPICAL_SHARE = 0.3
FERTILITY_TEXTS = 1_000
NOT_TEXT = ("label", "labels", "target")


@method(
    "idt5",
    stage="vocabulary",
    needs=("text", "tokenizer"),
    suits={"kinds": TEXT_KINDS},
    paper="Fuadi, Wibawa, Sumpeno (2023)",
)
@dataclass(frozen=True, kw_only=True)
class KeepVocabularyMethod:
    """Keep the tokens that the corpus uses; cut embeddings, head and tokenizer down to them.

    The corpus is the task's training split, or a text file of your own; the task's own tokens stay too.
    """

    coverage: float = setting(0.999, low=0.01, high=1.0, help="share of the corpus's tokens that must be kept")
    size: int | None = setting(None, low=1, help="number of tokens kept, instead of coverage")
    multiple: int = setting(64, low=1, help="the number kept is rounded up to a multiple of this")
    corpus: str | None = setting(None, help="a UTF-8 text file to count, one text per line")
    keep: tuple[int, ...] | None = setting(None, help="these ids (with what they need), instead of counting a corpus")
    words: tuple[str, ...] = setting((), help="words and prompts whose tokens stay")

    def __post_init__(self) -> None:
        if self.keep is not None and (self.size is not None or self.corpus is not None):
            raise ValueError("keep names the tokens, so leave out size and corpus")

    def __call__(self, subject: Subject) -> None:
        old, task = subject.tokenizer, subject.task
        rows = subject.anatomy.embeddings.weight.shape[0]
        kept = self._choose(subject)
        if int(kept[-1]) >= rows:
            raise LeanError(f"the tokenizer has ids up to {int(kept[-1])} but the model has {rows} embeddings.")
        if len(kept) < rows:
            new = trim(old, kept)  # first, as it may be refused and changes nothing
            subject.apply(KeepVocabulary(size=len(kept)), keep=kept)
            subject.tokenizer = new
        sample = list(texts_of(task, FERTILITY_TEXTS))
        words = max(1, sum(len(text.split()) for text in sample))
        subject.notes["vocabulary"] = {
            "before": rows,
            "after": len(kept),
            "tokens_per_word_before": int(count(old, sample).sum()) / words,
            "tokens_per_word_after": int(count(subject.tokenizer, sample).sum()) / words,
        }

    def _choose(self, subject: Subject) -> Any:
        """The old ids to keep, sorted: int64 [size]."""
        tokenizer, task = subject.tokenizer, subject.task
        words = [*self.words, *(task.labels or ()), *_prefixes(task)]
        forced = {index for index in config_ids(subject.model) if index < len(tokenizer)}
        if self.keep is not None:
            return close(tokenizer, sorted(forced.union(self.keep)), words)
        if self.corpus is None:
            counts = count(tokenizer, texts_of(task))
        else:
            counts = count(tokenizer, _lines(self.corpus))
            forced |= set(count(tokenizer, texts_of(task)).nonzero().flatten().tolist())
        return choose(
            counts,
            tokenizer,
            coverage=self.coverage,
            size=self.size,
            multiple=self.multiple,
            forced=sorted(forced),
            texts=words,
        )

    def refuses(self, anatomy: Any, task: Any) -> str | None:
        if not anatomy.is_text:
            return "it reads no tokens"
        if not isinstance(anatomy.embeddings, nn.Embedding):
            return "its embeddings are already quantised; cut the vocabulary first"
        return None

    def estimate(self, anatomy: Any, length: int = 128) -> Saving:
        """By the size or the number of ids where given, else by what is typical of an English corpus."""
        rows = anatomy.embeddings.weight.shape[0]
        size = self.size or (len(self.keep) if self.keep is not None else round(TYPICAL_SHARE * rows))
        cost = KeepVocabulary(size=min(rows, -(-size // self.multiple) * self.multiple)).cost(anatomy)
        return Saving(parameters=cost.parameters, flops=cost.flops(length))

    @classmethod
    def space(cls) -> dict[str, Choice | Range]:
        return {"coverage": Choice((0.99, 0.999, 1.0))}

    @classmethod
    def starts(cls) -> list[dict[str, Any]]:
        return [{}]


def texts_of(task: Any, limit: int | None = None) -> Iterator[str]:
    """The texts of the task's training rows, never of validation or test."""
    for row in task.rows("train", limit):
        yield from (value for name, value in row.items() if isinstance(value, str) and name not in NOT_TEXT)


def config_ids(model: Any) -> set[int]:
    """The token ids that config and generation config name: padding, ends, decoder start, suppressed ones."""
    found: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        for name, value in vars(config).items() if config is not None else ():
            if name.endswith(("_token_id", "_token_ids", "suppress_tokens", "bad_words_ids")):
                found |= set(_numbers(value))
    return found


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        yield value


def _prefixes(task: Any) -> list[str]:
    names = ("prefix", "query_prefix", "body_prefix")
    return [text for name in names if (text := getattr(task, name, None))]


def _lines(path: str) -> Iterator[str]:
    try:
        with Path(path).open(encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise LeanError(f"method 'idt5': the corpus {path} cannot be read as UTF-8 text: {error}.") from error
