"""A lean model is an ordinary model: Trainer, peft, deep copies, torch.compile, torch.export, generate."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from leanformers.surgery import (
    FactoriseLinear,
    KeepHeads,
    KeepNeurons,
    MaskWeights,
    QuantiseLinear,
    apply,
    ledger,
)

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 96,
}
MASKED = "layers.1.mlp.down_proj"


def lean_llama(quantised: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()
    apply(model, KeepHeads(path="layers.0.self_attn", size=1), keep=torch.tensor([1]))
    apply(model, KeepNeurons(path="layers.0.mlp", size=40), keep=torch.arange(40))
    apply(model, FactoriseLinear(path="layers.1.self_attn.q_proj", rank=8))
    apply(model, MaskWeights(path=MASKED), mask=torch.rand(32, 64) > 0.5)
    if quantised:
        pytest.importorskip("torchao")
        apply(model, QuantiseLinear(path="layers.1.mlp.up_proj", scheme="int8_dynamic"))
    return model


def lean_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES)).eval()
    apply(model, KeepNeurons(path="encoder.layer.0", size=40), keep=torch.arange(40))
    return apply(model, FactoriseLinear(path="encoder.layer.1.attention.self.query", rank=8))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(5, 96, (2, 9), generator=torch.Generator().manual_seed(3))


def arguments(folder: Path, **options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **options,
    )


def rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 96, (count, 7), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def test_trainer_trains_checkpoints_and_resumes(tmp_path):
    whole = lean_llama()
    Trainer(whole, arguments(tmp_path / "a", max_steps=4, save_strategy="no"), train_dataset=rows()).train()

    half = lean_llama()
    first = arguments(tmp_path / "b", max_steps=4, save_steps=2, save_strategy="steps")
    Trainer(half, first, train_dataset=rows()).train()
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "checkpoint-2")
    assert ledger(resumed) == ledger(half)
    Trainer(resumed, first, train_dataset=rows()).train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_training_keeps_masked_weights_at_zero(tmp_path):
    model = lean_llama()
    masked = model.model.get_submodule(MASKED)
    before = masked.weight.detach().clone()
    options = {"max_steps": 6, "save_strategy": "no", "weight_decay": 0.1}
    Trainer(model, arguments(tmp_path, **options), train_dataset=rows()).train()
    assert (masked.weight[before == 0] == 0).all()
    assert not torch.equal(masked.weight, before)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").model.get_submodule(MASKED)
    assert torch.equal(again.weight, masked.weight) and torch.equal(again.mask, masked.mask)


@pytest.mark.parametrize("quantised", [False, True])
def test_peft_puts_lora_on_it(tmp_path, ids, quantised):
    peft = pytest.importorskip("peft")
    base = lean_llama(quantised)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj", "down_proj"])
    adapted = peft.get_peft_model(base, config)
    torch.nn.init.normal_(adapted.base_model.model.model.layers[0].self_attn.v_proj.lora_B["default"].weight)
    adapted.eval()
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    with torch.inference_mode():  # where a gradient is wanted, int8 products are taken in float
        assert torch.equal(again(ids).logits, adapted(ids).logits)


def test_a_merged_adapter_saves_as_a_lean_model(tmp_path, ids):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj"])
    adapted = peft.get_peft_model(lean_llama(), config)
    torch.nn.init.normal_(adapted.base_model.model.model.layers[0].self_attn.v_proj.lora_B["default"].weight)
    merged = adapted.merge_and_unload().eval()
    merged.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, merged(ids).logits)


def test_a_deep_copy_is_independent_and_saves_itself(tmp_path, ids):
    model = lean_llama()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.zero_()
    assert not torch.equal(twin(ids).logits, model(ids).logits)
    twin.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, twin(ids).logits)


@pytest.mark.parametrize("quantised", [False, True])
def test_generate_with_cache_equals_without(ids, quantised):
    model = lean_llama(quantised)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "backend"), [(lean_bert, "aot_eager"), (lambda: lean_llama(quantised=True), "inductor")]
)
def test_compile_gives_the_same_outputs(ids, make, backend):
    model = make()
    with torch.inference_mode():
        compiled = torch.compile(model, dynamic=True, backend=backend)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_export_gives_the_same_outputs(ids):
    exporters = pytest.importorskip("transformers.exporters")
    model = lean_bert()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exported = exporters.DynamoExporter().export(model, inputs, exporters.DynamoConfig(dynamic=True))
    program = getattr(exported, "program", exported)
    with torch.inference_mode():
        output = program.module()(**inputs)
    logits = output["logits"] if isinstance(output, dict) else output.logits
    torch.testing.assert_close(logits, model(**inputs).logits)


def test_half_precision_round_trip(tmp_path, ids):
    model = lean_llama(quantised=True).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    # `to` rounds the frequencies of the rotary embedding too; a checkpoint that is loaded has them in float32.
    model.model.rotary_emb = again.model.rotary_emb
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_sharded_checkpoints_load(tmp_path, ids):
    model = lean_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_pipeline_runs_a_lean_model(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "good", "bad", *map(str, range(92))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    model = lean_bert()
    model.save_pretrained(tmp_path)
    answer = pipeline("text-classification", model=str(tmp_path))("good bad good")
    with torch.inference_mode():
        scores = AutoModelForSequenceClassification.from_pretrained(tmp_path)(torch.tensor([[2, 3, 2]])).logits.softmax(
            -1
        )
    assert answer[0]["score"] == pytest.approx(scores.max().item(), rel=1e-5)
