"""Laws of cutting a tokenizer, on every kind of fast tokenizer: real ones and ones trained on the spot.

The laws are the identities of the paper's card: coverage (1), everything kept (5), decoding (6), specials and
chat template (7), saving and loading (8), trimming again (9).
"""

from __future__ import annotations

import collections
import copy
import math
import typing

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

from leanformers.errors import LeanError
from leanformers.surgery.tokenizers import choose, close, count, save, trim
from leanformers.surgery.tokenizers.backend import Backend
from vocabularies import BYTES, CORPUS, MAKERS, OTHER, TEXTS, byte_level, unigram, whole_words, wordpiece


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    made = MAKERS[request.param]()
    made.test_name, made.uncalled = request.param, copy.deepcopy(made)
    return made


@pytest.fixture(scope="module")
def keep(tokenizer):
    return choose(count(tokenizer, CORPUS), tokenizer, coverage=0.9, texts=["the first", "argument"])


@pytest.fixture(scope="module")
def small(tokenizer, keep):
    return trim(tokenizer, keep)


def ids_of(tokenizer, text) -> list[int]:
    return tokenizer(text, padding=False, truncation=False)["input_ids"]


def state(tokenizer):
    return Backend.of(tokenizer).spec


# --- the laws ---


def test_covered_text_keeps_its_ids(tokenizer, keep, small):
    kept, covered = set(keep.tolist()), 0
    windows = [text[at : at + 25] for text in TEXTS for at in range(0, len(text), 25)]
    for text in [*TEXTS, *OTHER, *windows]:
        old = ids_of(tokenizer, text)
        if kept.issuperset(old):
            covered += 1
            assert ids_of(small, text) == torch.searchsorted(keep, torch.tensor(old, dtype=torch.long)).tolist()
    assert covered > 100, "the law was hardly tried"
    assert len(small) == len(keep) < len(tokenizer)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1.0), text=st.text(max_size=40))
@pytest.mark.parametrize("name", ["wordpiece", "unigram", "byte-level", "end-of-word", "byte-fallback"])
def test_any_closed_set_keeps_the_ids_of_what_it_covers(name, seed, share, text):
    tokenizer = made(name)
    numbers = torch.Generator().manual_seed(seed)
    chosen = torch.nonzero(torch.rand(len(tokenizer), generator=numbers) < share).flatten()
    sample = TEXTS[seed % len(TEXTS)]
    keep = close(tokenizer, chosen, [sample])
    assert torch.equal(close(tokenizer, keep), keep)
    small = trim(tokenizer, keep)
    kept = set(keep.tolist())
    for line in (sample, text, sample[:40] + text):
        old = ids_of(tokenizer, line)
        if kept.issuperset(old):
            assert keep[ids_of(small, line)].tolist() == old
    if name in BYTES:
        assert small.decode(ids_of(small, text)) == tokenizer.decode(ids_of(tokenizer, text))


_made: dict[str, typing.Any] = {}


def made(name):
    if name not in _made:
        _made[name] = MAKERS[name]()
    return _made[name]


def test_everything_kept_is_the_same_tokenizer(tokenizer):
    same = trim(tokenizer, range(len(tokenizer)))
    assert state(same) == state(tokenizer)
    assert type(same) is type(tokenizer)


def test_text_beyond_the_vocabulary_still_decodes(tokenizer, small):
    if tokenizer.test_name not in BYTES:
        pytest.skip("this vocabulary has no bytes")
    for text in [*TEXTS, *OTHER]:
        assert small.decode(ids_of(small, text)) == tokenizer.decode(ids_of(tokenizer, text))


def test_seen_characters_never_become_unknown(tokenizer, small):
    if tokenizer.test_name not in ("minilm", "wordpiece", "unigram", "t5"):
        pytest.skip("no characters in this vocabulary")
    seen = set("".join(CORPUS))
    for word in {word for text in OTHER for word in text.split() if seen.issuperset(word)}:
        if tokenizer.unk_token_id not in ids_of(tokenizer, word):
            assert small.unk_token_id not in ids_of(small, word), word


def test_specials_templates_and_settings_move_along(tokenizer, keep, small):
    assert small.special_tokens_map == tokenizer.special_tokens_map
    assert keep[small.all_special_ids].tolist() == tokenizer.all_special_ids
    assert small.get_added_vocab().keys() == tokenizer.get_added_vocab().keys()
    assert small.num_special_tokens_to_add(pair=True) == tokenizer.num_special_tokens_to_add(pair=True)
    assert small.padding_side == tokenizer.padding_side and small.name_or_path == tokenizer.name_or_path
    assert small.model_max_length == tokenizer.model_max_length
    old, new = state(tokenizer), state(small)
    for part in ("normalizer", "pre_tokenizer", "decoder", "truncation"):
        assert new[part] == old[part]
    pair = ("the first", "argument")
    assert keep[small(*pair)["input_ids"]].tolist() == tokenizer(*pair)["input_ids"]
    assert small(*pair).get("token_type_ids") == tokenizer(*pair).get("token_type_ids")
    if tokenizer.pad_token is not None:
        batch = ["the argument", "the"]
        padded = small(batch, padding=True)["input_ids"]
        assert [keep[row].tolist() for row in padded] == tokenizer(batch, padding=True)["input_ids"]


def test_the_chat_template_keeps_its_ids(tokenizer, keep, small):
    if not tokenizer.chat_template:
        pytest.skip("no chat template")
    turns = [{"role": "user", "content": "the"}]
    old, new = (t.apply_chat_template(turns, add_generation_prompt=True)["input_ids"] for t in (tokenizer, small))
    assert keep[new].tolist() == old


def test_padding_and_truncation_in_the_file_move_along():
    tokenizer = whole_words()
    keep = close(tokenizer, range(40, 90))
    old, new = state(tokenizer), state(trim(tokenizer, keep))
    assert old["padding"] | {"pad_id": keep.tolist().index(old["padding"]["pad_id"])} == new["padding"]
    assert old["truncation"] == new["truncation"] != None  # noqa: E711


def test_saved_and_loaded_with_auto_classes(tokenizer, keep, small, tmp_path):
    trim(tokenizer.uncalled, keep).save_pretrained(tmp_path / "one")  # calls leave padding behind
    again = AutoTokenizer.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two and set(one) <= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert state(again)["model"] == state(small)["model"]
    for text in [*CORPUS[:20], *OTHER[-4:]]:
        assert again(text).data == small(text).data


def test_trimming_again_keeps_everything(tokenizer, keep, small):
    again = choose(count(small, CORPUS), small, size=len(keep))
    assert again.tolist() == list(range(len(small)))
    assert state(trim(small, again)) == state(small)


def test_two_cuts_compose(tokenizer, keep, small):
    second = choose(count(small, CORPUS[:20]), small, coverage=0.5, multiple=1)
    assert state(trim(trim(tokenizer, keep), second)) == state(trim(tokenizer, keep[second]))


def test_no_kept_token_becomes_unreachable(tokenizer, keep, small):
    """Every token that the old model makes of its own string, the new one makes too."""
    old, new = tokenizer.backend_tokenizer.model, small.backend_tokenizer.model
    reached = 0
    for new_id, old_id in enumerate(keep.tolist()):
        token = tokenizer.convert_ids_to_tokens(old_id).removesuffix("</w>")
        if [piece.id for piece in old.tokenize(token)] == [old_id]:
            reached += 1
            assert [piece.id for piece in new.tokenize(token)] == [new_id]
    assert reached > 0.5 * len(keep)


def test_merges_keep_their_order(tokenizer, small):
    if Backend.of(tokenizer).kind != "BPE":
        pytest.skip("no merges")
    old, new = ([tuple(pair) for pair in state(t)["model"]["merges"]] for t in (tokenizer, small))
    vocabulary = small.get_vocab()
    assert new == [pair for pair in old if {*pair, "".join(pair).replace("</w>", "", 0)} <= vocabulary.keys()]
    assert 0 < len(new) < len(old)


# --- counting and choosing ---


def test_counts_are_those_of_plain_encoding(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    counts = count(tokenizer, iter(CORPUS[:300]))
    assert tokenizer.backend_tokenizer.to_str() == before, "counting must not change truncation or padding"
    plain = collections.Counter()
    for text in CORPUS[:300]:
        plain.update(tokenizer(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"])
    assert {index: n for index, n in enumerate(counts.tolist()) if n} == plain


def test_coverage_is_reached_and_rounded(tokenizer):
    counts = count(tokenizer, CORPUS)
    previous = 0
    for coverage in (0.5, 0.999, 1.0):
        keep = choose(counts, tokenizer, coverage=coverage)
        assert counts[keep].sum() >= coverage * counts.sum()
        assert len(keep) % 64 == 0 or len(keep) == len(tokenizer)
        assert len(keep) >= previous and torch.equal(keep, keep.unique())
        assert torch.equal(close(tokenizer, keep), keep)
        previous = len(keep)
    bare = choose(counts, tokenizer, coverage=0.5, multiple=1)
    assert set(bare.tolist()) <= set(choose(counts, tokenizer, coverage=0.5).tolist())


def test_size_forced_ids_and_texts(tokenizer):
    counts = count(tokenizer, CORPUS[:50])
    smallest = len(choose(counts, tokenizer, coverage=1e-9, multiple=1))
    size = min(smallest + 100, len(tokenizer))
    assert len(choose(counts, tokenizer, size=size, multiple=1)) == size
    assert len(choose(counts, tokenizer, size=10**6)) == len(tokenizer)
    text, last = "a label of whole words", len(tokenizer) - 1
    kept = set(choose(counts, tokenizer, coverage=0.5, forced=[last], texts=[text]).tolist())
    assert last in kept and kept.issuperset(ids_of(tokenizer, text))
    with pytest.raises(LeanError, match="size=3 is below"):
        choose(counts, tokenizer, size=3, multiple=1)


def test_empty_rows_fill_up_last():
    backend = Tokenizer(models.WordPiece({}, unk_token="[UNK]"))
    words = ["[UNK]", "[PAD]", *(f"[unused{index}]" for index in range(9)), "the", "word", "seen"]
    backend = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    keep = choose(count(tokenizer, ["seen seen"]), tokenizer, size=5, multiple=1)
    assert [words[index] for index in keep] == ["[UNK]", "[PAD]", "the", "word", "seen"]


def test_the_unknown_penalty_stays():
    """Were the lowest score dropped, an unknown character would undercut the full tokenizer's path."""
    vocab = [("<unk>", 0.0), ("<pad>", 0.0), ("a", -30.0), ("b", -1.0), ("ab", -36.5), ("c", -2.0)]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    assert 4 in close(tokenizer, [3]).tolist()


# --- files and refusals ---


def test_scores_of_full_precision_load():
    vocab = [["<unk>", 0.0], *([chr(97 + index), -math.sqrt(index + 2)] for index in range(26))]
    backend = Tokenizer(models.Unigram([tuple(row) for row in vocab], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")
    small = trim(tokenizer, close(tokenizer, range(5, 20)))
    for piece, score in state(small)["model"]["vocab"]:
        assert math.isclose(score, dict(vocab)[piece], rel_tol=1e-15)


def test_save_leaves_no_stale_vocabulary(tmp_path):
    tokenizer = wordpiece()
    for name in ("vocab.txt", "added_tokens.json", "merges.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_text("stays")
    save(trim(tokenizer, close(tokenizer, range(50))), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_a_class_that_rebuilds_its_pipeline_gives_way(tmp_path):
    """BertTokenizer forgets a changed normaliser on loading; the cut tokenizer does not."""
    tokenizer = wordpiece()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])
    tokenizer.padding_side = "left"
    small = trim(tokenizer, choose(count(tokenizer, CORPUS), tokenizer))
    assert type(small) is PreTrainedTokenizerFast and small.padding_side == "left"
    small.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert state(again) == state(small) and again.padding_side == "left"
    assert again.model_input_names == tokenizer.model_input_names
    assert state(small)["normalizer"] == state(tokenizer)["normalizer"]


class Upper:
    def normalize(self, text):
        text.uppercase()


def custom():
    tokenizer = unigram()
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Normalizer.custom(Upper())
    return tokenizer


def unknownless():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


class Slow:
    is_fast = False


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (ByT5Tokenizer, "ByT5Tokenizer reads bytes"),
        (CanineTokenizer, "CanineTokenizer reads bytes"),
        (Slow, "Slow is not a fast tokenizer"),
        (lambda: None, "no tokenizer"),
        (custom, "custom Python components"),
        (unknownless, "unknown token"),
    ],
)
def test_tokenizers_that_cannot_be_cut(make, words):
    tokenizer = make()
    for call in (
        lambda: close(tokenizer, [0]),
        lambda: trim(tokenizer, [0]),
        lambda: count(tokenizer, ["a"]),
    ):
        with pytest.raises(LeanError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_keeps_that_are_refused(tokenizer, keep):
    without = [index for index in keep.tolist() if index != tokenizer.all_special_ids[0]]
    with pytest.raises(LeanError, match=r"keep lacks 1 ids .* close\(tokenizer, keep\)"):
        trim(tokenizer, without)
    with pytest.raises(LeanError, match="strictly increasing"):
        trim(tokenizer, keep.flip(0))
    for wrong in (-1, len(tokenizer)):
        with pytest.raises(LeanError, match=f"keep holds {wrong}, which is no token"):
            trim(tokenizer, [wrong])
    with pytest.raises(LeanError, match="corpus holds no tokens"):
        choose(count(tokenizer, []), tokenizer)
    with pytest.raises(LeanError, match="count anew"):
        choose(torch.zeros(3, dtype=torch.long), tokenizer)
    with pytest.raises(LeanError, match="coverage=2"):
        choose(count(tokenizer, CORPUS[:1]), tokenizer, coverage=2)


def test_a_token_without_its_derivation_is_refused():
    tokenizer = byte_level()
    model = state(tokenizer)["model"]
    left, right = next(pair for pair in model["merges"] if len(pair[0]) > 1)
    whole = close(tokenizer, [model["vocab"][left + right]])
    broken = [index for index in whole.tolist() if index != model["vocab"][left]]
    with pytest.raises(LeanError, match="keep lacks"):
        trim(tokenizer, broken)
