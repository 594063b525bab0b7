"""A packed encoder is the stock one without padding: every output at a real token, whatever was edited before."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from drawing import KINDS, draw
from padded import EXACT, LENGTHS, check_states, ragged, states

import leanformers as lean
from families import TINY, inputs, outputs
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.kernels.varlen import refusal_of_device
from leanformers.packing import Index, is_packed, pack, refusal
from leanformers.packing.fusing import LinearGelu
from leanformers.packing.support import refusal_here
from leanformers.surgery import apply, ledger

ENCODERS = ("bert", "roberta", "distilbert", "electra", "mpnet", "xlm-roberta", "camembert")


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", ENCODERS)
def test_states_are_the_padded_ones_and_padding_is_zero(family, left):
    model = TINY[family](head="base")
    check_states(model, pack(model), ragged(model, left=left))


@pytest.mark.parametrize("head", ["classification", "lm"])
@pytest.mark.parametrize("family", ENCODERS)
def test_heads_answer_as_ever(family, head):
    model = TINY[family](head=head)
    batch = ragged(model)
    before, after = outputs(model, batch), outputs(pack(model), batch)
    if head == "lm":
        mask = batch["attention_mask"].bool()
        before, after = before[mask], after[mask]
    torch.testing.assert_close(after, before, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "mpnet"])
def test_edited_models_pack_too(family, kind):
    model, made = TINY[family](), 0
    for seed in range(2):
        drawn = draw(model, kind, seed)
        if drawn is not None:
            try:
                apply(model, drawn[0], **drawn[1])
                made += 1
            except LeanError:
                continue
    if not made:
        pytest.skip("the family has no place for this edit")
    if kind in ("swap_attention", "reduce_tokens"):
        with pytest.raises(LeanError, match="holds a mixer"):
            pack(model)
        return
    packed = pack(model)
    assert ledger(packed) == ledger(model)
    batch = ragged(model)
    check_states(model, packed, batch)
    torch.testing.assert_close(outputs(packed, batch), outputs(model, batch), **EXACT)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_many_edits_at_once(family):
    model = TINY[family]()
    for seed, kind in enumerate(("keep_heads", "keep_neurons", "factorise_linear", "drop_layers", "quantise_linear")):
        edit, tensors = draw(model, kind, seed)
        apply(model, edit, **tensors)
    check_states(model, pack(model), ragged(model))


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
@pytest.mark.parametrize(
    "lengths", [(6, 6, 6), (1,), (9,), (1, 9), (9, 1, 1), (3, 8, 2, 5, 9, 1, 7)], ids=lambda lengths: str(lengths)
)
def test_lengths_of_every_kind(family, lengths):
    model = TINY[family](head="base")
    check_states(model, pack(model), ragged(model, lengths, max(lengths)))


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_a_sequence_knows_nothing_of_its_batch_mates(family):
    model = pack(TINY[family]())
    batch = ragged(model)
    together = outputs(model, batch)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(outputs(model, {k: v[order] for k, v in batch.items()}), together[order], **EXACT)
    for row, length in enumerate(LENGTHS):
        alone = {name: part[row : row + 1, :length] for name, part in batch.items()}
        torch.testing.assert_close(outputs(model, alone)[0], together[row], **EXACT)


def test_without_a_mask_every_token_is_real():
    model = TINY["bert"]()
    ids = ragged(model, (9, 9), 9)["input_ids"]
    torch.testing.assert_close(outputs(pack(model), {"input_ids": ids}), outputs(model, {"input_ids": ids}), **EXACT)


def test_a_mask_may_have_holes_and_empty_rows():
    model = TINY["bert"](head="base")
    batch = ragged(model)
    batch["attention_mask"][0, 3:5] = 0
    batch["attention_mask"][2] = 0
    packed = pack(model)
    check_states(model, packed, batch)
    batch["attention_mask"][:] = 0
    assert not states(packed, batch).any()
    mpnet = pack(TINY["mpnet"]())
    batch["attention_mask"][0, ::2] = 1
    with pytest.raises(LeanError, match="zeros between ones"):
        mpnet(**batch)


def test_the_index_is_what_nonzero_finds():
    mask = torch.rand(6, 13, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[2] = False
    index = Index.of(mask)
    assert torch.equal(index.places, torch.nonzero(mask.flatten())[:, 0])
    assert index.cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert index.cu_seqlens.dtype == torch.int32
    assert (index.max_length, index.tokens) == (int(mask.sum(1).max()), int(mask.sum()))
    values = torch.randn(6, 13, 3)
    assert torch.equal(index.unpack(index.pack(values)), values * mask[..., None])
    assert Index.holes(mask) and not Index.holes(mask.sort(1).values) and not Index.holes(~mask[:, :1])


def test_arguments_and_outputs_are_the_stock_ones():
    model = TINY["bert"](head="base")
    packed, batch = pack(model), ragged(model)
    mask = batch["attention_mask"].bool()
    types = torch.randint(0, 2, mask.shape)
    positions = torch.arange(9).flip(0)[None]
    with torch.no_grad():
        args = (batch["input_ids"], batch["attention_mask"], types, positions)
        before, after = model(*args, output_hidden_states=True), packed(*args, output_hidden_states=True)
        assert type(after) is type(before) and list(after) == list(before)
        torch.testing.assert_close(after.pooler_output, before.pooler_output, **EXACT)
        assert len(after.hidden_states) == len(before.hidden_states)
        for one, two in zip(before.hidden_states, after.hidden_states, strict=True):
            torch.testing.assert_close(two[mask], one[mask], **EXACT)
        plain = packed(**batch, return_dict=False)
        assert isinstance(plain, tuple)
        torch.testing.assert_close(plain[0][mask], states(model, batch)[mask], **EXACT)
        embedded = model.get_input_embeddings()(batch["input_ids"])
        for family in ("bert", "roberta", "distilbert"):
            model = TINY[family](head="base")
            embedded = model.get_input_embeddings()(batch["input_ids"])
            given = {"inputs_embeds": embedded, "attention_mask": batch["attention_mask"]}
            torch.testing.assert_close(states(pack(model), given)[mask], states(model, given)[mask], **EXACT)


def test_the_model_given_is_left_alone_and_shares_its_weights(tmp_path):
    model = TINY["bert"]()
    batch, before = ragged(model), None
    before = outputs(model, batch)
    packed = lean.pack(model)
    assert type(packed) is type(model)
    for one, two in zip(model.parameters(), packed.parameters(), strict=True):
        assert one is two
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(outputs(model, batch), before)
    packed.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed")
    assert not is_packed(again)
    assert torch.equal(outputs(again, batch), before)
    twice = copy.deepcopy(packed)
    with torch.no_grad():
        model.classifier.bias += 1
    torch.testing.assert_close(outputs(packed, batch), before + 1, **EXACT)
    torch.testing.assert_close(outputs(twice, batch), before, **EXACT)


def test_gradients_flow_in_evaluation_mode():
    model = TINY["bert"]()
    batch = ragged(model)
    packed = pack(model)
    loss, other = packed(**batch).logits.square().sum(), model(**batch).logits.square().sum()
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    torch.testing.assert_close(
        torch.autograd.grad(loss, weight)[0], torch.autograd.grad(other, weight)[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", [name for name in TINY if name not in ENCODERS])
def test_what_cannot_be_packed_says_so_and_is_left_as_it_was(family):
    model = TINY[family]()
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(LeanError) as error:
        pack(model)
    assert str(error.value) == refusal(model)
    assert str(error.value).count(". ") == 0 and type(model).__name__ in str(error.value)
    assert model.config.to_dict() == before
    batch = inputs(model, padded=True)
    assert outputs(model, batch).isfinite().all()


def test_t5_encoders_and_chunks_are_refused():
    from transformers import T5Config, T5EncoderModel

    tiny = T5EncoderModel(T5Config(d_model=16, d_kv=4, num_heads=2, d_ff=16, num_layers=1, vocab_size=32))
    with pytest.raises(
        LeanError, match="bias of positions to its attention scores, which packed attention does not know"
    ):
        pack(tiny)
    with pytest.raises(LeanError, match="chunk_size_feed_forward to 0"):
        pack(TINY["bert"](chunk_size_feed_forward=2))
    with pytest.raises(LeanError, match="is causal"):
        pack(TINY["bert"](head="base", is_decoder=True))
    with pytest.raises(LeanError, match="holds 0 models"):
        pack(torch.nn.Linear(2, 2))


def test_calls_that_cannot_be_answered_are_refused():
    model = TINY["bert"](head="base")
    packed, batch = pack(model), ragged(model)
    with pytest.raises(LeanError, match="never holds attention weights"):
        packed(**batch, output_attentions=True)
    with pytest.raises(LeanError, match=r"mask .batch, length., not one of 4 axes"):
        packed(batch["input_ids"], batch["attention_mask"][:, None, None])
    with pytest.raises(LeanError, match="takes no encoder_hidden_states"):
        packed(**batch, encoder_hidden_states=torch.zeros(5, 3, 32))
    with pytest.raises(LeanError, match="packed already"):
        pack(packed)
    with pytest.raises(LeanError, match=r"call the model that leanformers\.pack returned"):
        packed.encoder.layer[0](torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="exactly one"):
        packed(attention_mask=batch["attention_mask"])
    packed.train()
    with pytest.raises(LeanError, match="for inference"):
        packed(**batch)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "mpnet"])
def test_it_compiles_into_one_graph_for_all_sizes(family):
    model = TINY[family](head="base")
    packed = pack(model, compile=True)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    packer = packed.packer
    run = functools.partial(packer._run_stock, packed)
    packer._compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for lengths in (LENGTHS, (3, 8, 2), (9, 7, 6, 2)):
        batch = ragged(model, lengths, max(lengths))
        mask = batch["attention_mask"].bool()
        torch.testing.assert_close(states(packed, batch)[mask], states(model, batch)[mask], **EXACT)
    assert len(graphs) == 1


def test_a_gpu_without_a_kernel_is_refused(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    refusal_of_device.cache_clear()
    gpu, narrow, wide = (
        torch.device("cuda"),
        Anatomy.of(TINY["bert"]()),
        Anatomy.of(TINY["bert"](num_attention_heads=2)),
    )
    assert refusal_here(narrow, gpu, torch.bfloat16) is None  # varlen_attn takes them
    assert "heads of 16 to 128 numbers, not 8" in refusal_here(narrow, gpu, torch.float32)
    assert refusal_here(wide, gpu, torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    refusal_of_device.cache_clear()
    assert "T4 is too old" in refusal_here(wide, gpu, torch.float16)
    refusal_of_device.cache_clear()
    assert refusal_here(wide, torch.device("cpu"), torch.float16) is None


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "mpnet"])
def test_what_graphs_fill_in_changes_nothing(family):
    """A graph's batch is longer and has more tokens than were given; on a CPU the same is run without a graph."""
    model = TINY[family](head="base")
    packed = pack(model)
    batch = ragged(model)
    mask = batch["attention_mask"].bool()
    rows, length = mask.shape
    filled = {name: torch.nn.functional.pad(part, (0, 5)) for name, part in batch.items()}
    index = Index.filled(filled.pop("attention_mask"), int(mask.sum()) + 7, int(mask.sum(1).max()) + 3)
    output = packed.packer._run(packed, packed.packer._row(packed, filled, index), index)
    assert output["last_hidden_state"].shape[1] == int(mask.sum()) + 7
    found = index.of_tokens(int(mask.sum())).unpack(output["last_hidden_state"])[:, :length]
    torch.testing.assert_close(found[mask], states(model, batch)[mask], **EXACT)
    assert found.shape[:2] == (rows, length) and not found[~mask].any()


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "mpnet"])
def test_activations_are_fused_on_the_copy_alone(family):
    model = TINY[family]()
    kinds = [type(module) for module in model.modules()]
    packed = pack(model)
    fused = [module for module in packed.modules() if isinstance(module, LinearGelu)]
    assert len(fused) == len(Anatomy.of(model).layers)
    assert [type(module) for module in model.modules()] == kinds
    assert packed.state_dict().keys() == model.state_dict().keys()
    assert Anatomy.of(packed).layers[0].feed_forward.up.out_features == 64


def test_other_activations_are_left_alone():
    model = TINY["bert"](hidden_act="relu")
    packed = pack(model)
    assert not any(isinstance(module, LinearGelu) for module in packed.modules())
    batch = ragged(model)
    torch.testing.assert_close(outputs(packed, batch), outputs(model, batch), **EXACT)


@pytest.mark.slow
def test_compiled_for_this_machine_it_says_the_same():
    model = TINY["bert"]()
    packed = pack(model, compile=True, graphs=True)
    for seed in range(2):
        batch = ragged(model, seed=seed)
        torch.testing.assert_close(outputs(packed, batch), outputs(model, batch), **EXACT)
    assert is_packed(copy.deepcopy(packed))
