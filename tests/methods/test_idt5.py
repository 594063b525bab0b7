"""Keeping a vocabulary, on models: the identities of the card on what the cut model computes."""

from __future__ import annotations

import copy
import functools
import json
import sys

import pytest
import torch
import transformers as T

from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.methods import Subject, build, get
from leanformers.methods.compress.idt5 import KeepVocabularyMethod, config_ids, texts_of
from leanformers.surgery import ledger, tier
from leanformers.surgery.tokenizers import choose, count
from leanformers.tasks.language import CausalLM, MaskedLM
from leanformers.tasks.text import TextClassification
from vocabularies import CORPUS, OTHER, byte_level, t5, wordpiece

PADDING = 12  # rows of the embeddings that no token has
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ROWS = [{"text": text} for text in CORPUS]
SPLITS = {"train": ROWS, "validation": ROWS[:5], "test": [{"text": text} for text in OTHER[:40]]}


def labelled(rows):
    return [{**row, "label": "long" if len(row["text"]) > 150 else "short"} for row in rows]


def bert():
    tokenizer = wordpiece()
    config = T.BertConfig(vocab_size=len(tokenizer) + PADDING, num_labels=2, **SIZES)
    splits = {name: labelled(rows) for name, rows in SPLITS.items()}
    return (
        T.BertForSequenceClassification(config),
        tokenizer,
        TextClassification("t", splits, labels=["long", "short"]),
    )


def masked():
    tokenizer = wordpiece()
    model = T.BertForMaskedLM(T.BertConfig(vocab_size=len(tokenizer) + PADDING, **SIZES))
    torch.nn.init.normal_(model.cls.predictions.bias)
    return model, tokenizer, MaskedLM("t", SPLITS, max_length=64)


def llama():
    tokenizer = byte_level()
    names = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = T.LlamaConfig(vocab_size=len(tokenizer) + PADDING, tie_word_embeddings=True, **names, **SIZES)
    model = T.LlamaForCausalLM(config)
    model.generation_config.suppress_tokens = [tokenizer.convert_tokens_to_ids("!")]
    return model, tokenizer, CausalLM("t", SPLITS, max_length=64)


def mt5():
    """Untied, as mT5 is; decoding starts from the padding token."""
    tokenizer = t5()
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    sizes |= {"tie_word_embeddings": False, "decoder_start_token_id": 0}
    config = T.MT5Config(vocab_size=len(tokenizer) + PADDING, **sizes)
    return T.MT5ForConditionalGeneration(config), tokenizer, CausalLM("t", SPLITS)


MAKERS = {"bert": bert, "masked": masked, "llama": llama, "mt5": mt5}


@functools.cache
def cut(name):
    """(subject before, subject after) with 95% of the corpus covered."""
    torch.manual_seed(0)
    model, tokenizer, task = MAKERS[name]()
    model = model.eval()
    before = Subject(model=copy.deepcopy(model), tokenizer=tokenizer, task=task)
    after = Subject(model=model, tokenizer=tokenizer, task=task)
    KeepVocabularyMethod(coverage=0.95)(after)
    return before, after


@pytest.fixture(params=MAKERS)
def pair(request):
    return cut(request.param)


def kept_ids(before, after):
    """Old id of each new one: by the tokens' strings."""
    names = after.tokenizer.convert_ids_to_tokens(list(range(len(after.tokenizer))))
    return torch.tensor(before.tokenizer.convert_tokens_to_ids(names))


def covered(before, after, least=5):
    """Inputs, before and after, of texts whose tokens all lie in the kept vocabulary."""
    kept = set(kept_ids(before, after).tolist())
    found = []
    for text in (text[:60] for text in [*CORPUS, *OTHER]):
        old = before.tokenizer(text, return_tensors="pt")
        if old["input_ids"].numel() > 2 and kept.issuperset(old["input_ids"].flatten().tolist()):
            found.append((old, after.tokenizer(text, return_tensors="pt")))
    assert len(found) >= least
    return found[:40]


def run(model, batch):
    inputs = {"input_ids": batch["input_ids"]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True)


def hidden(outputs):
    return outputs.get("hidden_states") or outputs["decoder_hidden_states"]


def test_covered_text_gives_the_same_hidden_states_and_logits(pair):
    before, after = pair
    kept = kept_ids(before, after)
    for old, new in covered(before, after):
        assert torch.equal(kept[new["input_ids"]], old["input_ids"])
        one, two = run(before.model, old), run(after.model, new)
        assert all(torch.equal(a, b) for a, b in zip(hidden(one), hidden(two), strict=True))
        expected = one.logits if before.task.kind == "text-classification" else one.logits[..., kept]
        torch.testing.assert_close(two.logits, expected, rtol=1e-5, atol=1e-6)


def test_loss_falls_by_the_probability_of_what_went(pair):
    before, after = pair
    if before.task.kind == "text-classification":
        pytest.skip("no head over the vocabulary")
    kept = kept_ids(before, after)
    for old, new in covered(before, after):
        one, two = run(before.model, old).logits, run(after.model, new).logits
        full = one.logsumexp(-1)
        loss = full - one.gather(-1, old["input_ids"][..., None])[..., 0]
        cut = two.logsumexp(-1) - two.gather(-1, new["input_ids"][..., None])[..., 0]
        torch.testing.assert_close(cut, loss + one[..., kept].logsumexp(-1) - full, rtol=1e-5, atol=1e-5)
        assert (cut <= loss + 1e-5).all()


def test_greedy_generation_is_unchanged_while_it_stays_in_the_vocabulary(pair):
    before, after = pair
    if not before.model.can_generate():
        pytest.skip("does not generate")
    kept, same = kept_ids(before, after), 0
    for old, new in covered(before, after)[:30]:
        options = {"max_new_tokens": 4, "do_sample": False}
        long, short = (s.model.generate(x["input_ids"], **options)[0] for s, x in ((before, old), (after, new)))
        if set(long.tolist()) <= set(kept.tolist()):
            same += 1
            assert torch.equal(kept[short], long)
    assert same


def test_config_ids_and_sizes_follow(pair):
    before, after = pair
    kept, rows = kept_ids(before, after), len(after.tokenizer)
    assert after.model.config.vocab_size == rows == after.model.get_input_embeddings().weight.shape[0]
    assert rows % 64 == 0 and rows < len(before.tokenizer)
    assert {int(kept[index]) for index in config_ids(after.model)} == config_ids(before.model)
    notes = after.notes["vocabulary"]
    assert (notes["before"], notes["after"]) == (len(before.tokenizer) + PADDING, rows)
    assert notes["tokens_per_word_before"] <= notes["tokens_per_word_after"]


RELOAD = """
import json, sys, torch, transformers
for folder, (name, text, ids) in json.load(open("cases.json")).items():
    model = getattr(transformers, name).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(text)["input_ids"] == ids, folder
    inputs = {"input_ids": torch.tensor([ids])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, torch.load(folder + "/expected.pt")), folder
assert "leanformers" not in sys.modules
"""


def test_saved_it_is_a_stock_checkpoint(tmp_path, fresh):
    """Loaded by transformers alone, in a process of its own, bit for bit."""
    cases = {}
    for name in MAKERS:
        before, after = cut(name)
        old, new = covered(before, after)[0]
        assert tier(after.model) == "stock", name
        after.model.save_pretrained(tmp_path / name)
        after.tokenizer.save_pretrained(tmp_path / name)
        again = type(after.model).from_pretrained(tmp_path / name).eval()
        assert all(torch.equal(one, again.state_dict()[key]) for key, one in after.model.state_dict().items())
        # Sums of another memory layout may differ in their last bit, so both sides read the file.
        torch.save(run(again, new).logits, tmp_path / name / "expected.pt")
        text = before.tokenizer.decode(old["input_ids"][0], skip_special_tokens=True)
        cases[name] = [type(again).__name__, text, after.tokenizer(text)["input_ids"]]
        assert cases[name][2] == new["input_ids"][0].tolist()
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-c", RELOAD]
    done = fresh.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_second_cut_on_the_same_corpus_keeps_everything(pair):
    _, after = pair
    again = Subject(model=copy.deepcopy(after.model), tokenizer=after.tokenizer, task=after.task)
    KeepVocabularyMethod(size=len(after.tokenizer))(again)
    assert again.tokenizer is after.tokenizer
    assert len(ledger(again.model)) == len(ledger(after.model))


def test_two_cuts_compose(pair):
    before, after = pair
    names = dict(zip(("one", "two"), (before, after), strict=True))
    second = KeepVocabularyMethod(keep=tuple(range(200)))
    made = {}
    for name, subject in names.items():
        ids = range(200) if name == "two" else kept_ids(before, after)[:200].tolist()
        new = Subject(model=copy.deepcopy(subject.model), tokenizer=subject.tokenizer, task=subject.task)
        KeepVocabularyMethod(keep=tuple(ids))(new)
        made[name] = new
    assert second.keep == tuple(range(200))
    assert made["one"].tokenizer.get_vocab() == made["two"].tokenizer.get_vocab()
    tables = [s.model.get_input_embeddings().weight for s in made.values()]
    assert torch.equal(*tables)


# --- the settings ---


def subject_of(maker):
    model, tokenizer, task = maker()
    return Subject(model=model.eval(), tokenizer=tokenizer, task=task)


def test_everything_kept_drops_only_the_padding():
    subject = subject_of(bert)
    tokenizer = subject.tokenizer
    KeepVocabularyMethod(size=10**6)(subject)
    assert subject.model.config.vocab_size == len(tokenizer)
    assert subject.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_only_training_texts_are_counted(monkeypatch):
    subject = subject_of(bert)
    test = {row["text"] for row in subject.task.rows("test")} - {row["text"] for row in subject.task.rows("train")}
    assert test and not test & set(texts_of(subject.task))
    assert not {"long", "short"} & set(texts_of(subject.task))


def test_a_corpus_of_ones_own_keeps_the_tasks_tokens_too(tmp_path):
    path, phrase = tmp_path / "corpus.txt", "leanformers slims"
    path.write_text("\n".join(OTHER[:100]), encoding="utf-8")
    sizes = []
    for options in ({}, {"corpus": str(path)}, {"corpus": str(path), "words": (phrase,)}):
        subject = subject_of(bert)
        old, train = subject.tokenizer, subject.task.splits["train"]
        subject.task.splits["train"] = train[:5]
        KeepVocabularyMethod(coverage=0.5, multiple=1, **options)(subject)
        sizes.append(subject.model.config.vocab_size)
        if options:
            for text in [*texts_of(subject.task), *options.get("words", ()), "long"]:
                assert subject.tokenizer.tokenize(text) == old.tokenize(text)
    assert sizes == sorted(set(sizes))


def test_estimate_is_what_happens():
    subject = subject_of(llama)
    before, method = Anatomy.of(subject.model), KeepVocabularyMethod(size=640)
    saving, parameters, flops = method.estimate(before, 16), before.parameters(), before.flops(16)
    method(subject)
    after = Anatomy.of(subject.model)
    assert after.parameters() - parameters == saving.parameters < 0
    assert after.flops(16) - flops == saving.flops < 0


def test_the_method_is_registered():
    info = get("idt5")
    assert info.stage == "vocabulary" and not info.trains
    assert build({"method": "idt5", "keep": [3, 4]}).keep == (3, 4)
    assert "does not suit" in info.unsuitable(task=type("Pictures", (), {"kind": "image-classification"}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": [1], "size": 3}, "leave out size"),
        ({"coverage": 0.0}, "'coverage'"),
        ({"corpus": "no/such/file.txt"}, "corpus no/such/file.txt cannot be read"),
        ({"keep": [10**6]}, "is no token of BertTokenizer"),
        ({"size": 2}, "size=2 is below"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(settings, words):
    subject = subject_of(bert)
    rows, tokenizer = subject.model.config.vocab_size, subject.tokenizer
    with pytest.raises(LeanError, match=words):
        build({"method": "idt5", "multiple": 1, **settings})(subject)
    assert subject.model.config.vocab_size == rows and subject.tokenizer is tokenizer


def test_a_tokenizer_of_another_model_is_refused():
    subject = subject_of(bert)
    subject.model = T.BertModel(T.BertConfig(vocab_size=100, **SIZES))
    with pytest.raises(LeanError, match="the model has 100 embeddings"):
        KeepVocabularyMethod()(subject)


def test_coverage_is_that_of_the_training_texts():
    subject = subject_of(llama)
    counts = count(subject.tokenizer, texts_of(subject.task))
    keep = choose(counts, subject.tokenizer, coverage=0.99)
    KeepVocabularyMethod(coverage=0.99)(subject)
    assert abs(subject.model.config.vocab_size - len(keep)) <= 64  # the ids in the config stay besides
