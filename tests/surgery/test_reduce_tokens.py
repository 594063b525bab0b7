"""The edit that drops tokens: exact where it does nothing, the same alone and in a padded batch, counted, refused."""

from __future__ import annotations

import copy

import pytest
import torch

from families import TINY, inputs, outputs
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.measure.cost import count_flops
from leanformers.parts import token_reducers
from leanformers.parts.page_rank import PageRank
from leanformers.parts.token_reducers import reduction
from leanformers.surgery import DropLayers, DropSublayers, KeepNeurons, ReduceTokens, SwapAttention, apply, ledger
from leanformers.surgery.edits.reduce_tokens import set_default

ENCODERS = ("bert", "roberta", "distilbert", "electra", "vit", "deit", "dinov2", "audio-spectrogram-transformer")
PADDED = ("bert", "roberta", "distilbert", "electra")
PLACES = token_reducers.PLACES
IDLE = {"keep": [1.0, 1.0], "drop": [0, 0], "votes": [3, 1]}
PRUNED = {"keep": [0.6, 0.7], "drop": [1, 0], "votes": [3, 1]}


def edit(where: str = "after_layer", settings: dict = PRUNED, layers: tuple[int, ...] = (0, 1)) -> ReduceTokens:
    return ReduceTokens(layers=layers, where=where, rule="page_rank", settings=settings)


def reduced(family: str, where: str = "after_layer", settings: dict = PRUNED, **fields):
    return apply(TINY[family](head="classification", **fields), edit(where, settings)).eval()


def row(batch: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    return {name: tensor[index : index + 1] for name, tensor in batch.items()}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("family", ENCODERS)
def test_keeping_all_is_the_model_to_the_bit(family, where):
    model = TINY[family](head="classification")
    batch = inputs(model, batch=3, length=9, padded=True)
    expected = outputs(model, batch)
    assert torch.equal(outputs(reduced(family, where, IDLE), batch), expected)
    assert not torch.allclose(outputs(reduced(family, where), batch), expected, atol=1e-3)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("family", ENCODERS)
def test_a_batch_equals_one_at_a_time(family, where):
    model = reduced(family, where)
    batch = inputs(model, batch=3, length=9, padded=True)
    together = outputs(model, batch)
    for index in range(3):
        one = row(batch, index)
        if family in PADDED:
            one = {name: tensor[:, : int(one["attention_mask"].sum())] for name, tensor in one.items()}
        torch.testing.assert_close(together[index : index + 1], outputs(model, one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_a_batch_beyond_the_caches_goes_through_in_parts(family, monkeypatch):
    model = reduced(family)
    batch = inputs(model, batch=5, length=9, padded=True)
    together = outputs(model, batch)
    kept = [left.index for left in reduction(model).left.values()]
    length = reduction(model).left[0].length
    monkeypatch.setattr(token_reducers, "_CACHED", 2 * 4 * model.config.num_attention_heads * length**2)
    seen = []
    scores = PageRank.scores
    monkeypatch.setattr(PageRank, "scores", lambda rule, place, *a: seen.append(len(a[0])) or scores(rule, place, *a))
    torch.testing.assert_close(outputs(model, batch), together, rtol=1e-5, atol=1e-5)
    assert seen[:3] == [2, 2, 1]
    again = [left.index for left in reduction(model).left.values()]
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


@pytest.mark.parametrize("family", PADDED)
def test_left_over_padding_is_not_seen(family):
    """More padding than any text of the batch needs changes no answer."""
    model = reduced(family)
    batch = inputs(model, batch=2, length=9, padded=True)
    wider = {name: torch.nn.functional.pad(tensor, (0, 5)) for name, tensor in batch.items()}
    wider["input_ids"][:, 9:] = model.config.pad_token_id or 0
    torch.testing.assert_close(outputs(model, wider), outputs(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "deit", "dinov2-swiglu"])
def test_the_feed_forward_sees_only_what_stays(family):
    """Dropping before the feed-forward is dropping after the layer, for those that stay: it works on each alone."""
    batch = inputs(reduced(family), batch=3, length=9, padded=True)
    before, after = reduced(family, "before_feed_forward"), reduced(family, "after_layer")
    torch.testing.assert_close(outputs(before, batch), outputs(after, batch), rtol=1e-5, atol=1e-5)
    seen = []
    Anatomy.of(before).layers[0].feed_forward.up.module.register_forward_hook(lambda m, a, o: seen.append(o.shape[1]))
    outputs(before, batch)
    assert seen == [int(torch.as_tensor(reduction(before).counts()[0]).max())]


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "audio-spectrogram-transformer"])
def test_class_tokens_stay_in_front(family):
    model = reduced(family)
    outputs(model, inputs(model, batch=4))
    front = Anatomy.of(model).family.summary_tokens
    for left in reduction(model).left.values():
        assert torch.equal(left.index[:, :front], torch.arange(front).expand(4, -1))
        assert (left.index.diff() > 0).all()


def test_permuted_patches_give_the_same_answer():
    """Patches permuted together with their positions keep the same set, and the order of a set is nothing."""
    model = reduced("vit")
    pixels = inputs(model, batch=2)["pixel_values"]
    before = outputs(model, {"pixel_values": pixels})
    embeddings = model.vit.embeddings
    plain = embeddings(pixels).detach()
    kept = [left.index for left in reduction(model).left.values()]
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(plain.shape[1] - 1)])
    handle = embeddings.register_forward_hook(lambda module, args, output: output[:, order])
    after = outputs(model, {"pixel_values": pixels})
    handle.remove()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    again = order[next(left.index for left in reduction(model).left.values())]
    assert torch.equal(again.sort(-1).values, kept[0])


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("family", ENCODERS)
def test_counts_and_flops_are_those_of_the_formula(family, where):
    model = TINY[family](head="classification")
    batch = row(inputs(model, batch=1, length=17), 0)
    dense = Anatomy.of(model)
    counted = count_flops(lambda: model(**batch), model).total
    change = edit(where).cost(dense)
    apply(model, edit(where))
    saved = count_flops(lambda: model(**batch), model).total - counted
    length = reduction(model).left[0].length
    assert saved == change.flops(length) < 0
    rule, now = reduction(model).rule, length
    for place, found in enumerate(reduction(model).counts()):
        now = rule.count(place, now, length)
        assert int(torch.as_tensor(found).max()) == now


def test_a_copy_and_a_second_model_have_their_own_state():
    one, other = reduced("bert"), reduced("bert", settings={"keep": [0.3, 0.3], "drop": [0, 0], "votes": [2, 2]})
    batch = inputs(one, batch=2, length=9, padded=True)
    expected = outputs(one, batch)
    twin = copy.deepcopy(one)
    assert reduction(twin) is not reduction(one)
    assert len({id(m.kept_tokens.reduction) for m in twin.modules() if hasattr(m, "kept_tokens")}) == 1
    between = []
    one.bert.encoder.layer[1].register_forward_pre_hook(lambda m, a: between.append(outputs(other, batch)))
    assert torch.equal(outputs(one, batch), expected) and len(between) == 1
    assert torch.equal(outputs(twin, batch), expected)


def test_a_call_leaves_nothing_to_the_next():
    model = reduced("bert")
    long, short = inputs(model, 2, 12, padded=True), inputs(model, 3, 5)
    expected = outputs(copy.deepcopy(model), short)
    outputs(model, long)
    with pytest.raises(Exception, match="too long"):
        handle = model.bert.encoder.layer[1].register_forward_pre_hook(_fail)
        try:
            outputs(model, long)
        finally:
            handle.remove()
    assert torch.equal(outputs(model, short), expected)


def _fail(module, args):
    raise RuntimeError("too long")


@pytest.mark.parametrize("where", PLACES)
def test_gradients_flow_through_what_stays_also_when_layers_are_computed_again(where):
    found = []
    for again in (False, True):
        model = reduced("bert", where, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0).train()
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        batch = inputs(model, batch=3, length=9, padded=True)
        model(**batch).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any(grad.any() for grad in found[0].values())
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-6)


def test_the_schedule_can_be_changed_and_is_saved(tmp_path):
    model = reduced("bert")
    batch = inputs(model, batch=2, length=9, padded=True)
    names = set(TINY["bert"](head="classification").state_dict())
    assert set(model.state_dict()) == names  # the stock model's tensors
    set_default(model, keep=[0.9, 0.4])
    expected = outputs(model, batch)
    assert torch.equal(outputs(reduced("bert", settings={**PRUNED, "keep": [0.9, 0.4]}), batch), expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again, batch), expected)
    assert ledger(again)[0].settings["keep"] == [0.9, 0.4]
    with pytest.raises(LeanError, match="keep has 1 values"):
        set_default(model, keep=[0.5])
    with pytest.raises(LeanError, match="drops no tokens"):
        set_default(TINY["bert"](), keep=[0.5, 0.5])


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_it_compiles_without_a_break(family):
    model = reduced(family)
    batch = inputs(model, batch=2, length=9, padded=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outputs(compiled, batch), outputs(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "head", "words"),
    [
        ("bert", "lm", "answers for every token"),
        ("llama", "classification", "decodes"),
        ("t5", "lm", "decodes"),
        ("mpnet", "classification", "bias of positions"),
        ("deberta-v2", "classification", "scores positions"),
        ("wav2vec2", "classification", "no token of its own"),
    ],
)
def test_what_needs_all_its_tokens_is_refused(family, head, words):
    model = TINY[family](head=head)
    with pytest.raises(LeanError, match=words):
        apply(model, edit())
    assert ledger(model) == ()


def test_a_dense_head_does_not_load_on_it(tmp_path):
    import transformers as T

    reduced("bert").save_pretrained(tmp_path)
    assert T.AutoModel.from_pretrained(tmp_path) is not None
    with pytest.raises(LeanError, match="answers for every token"):
        T.AutoModelForTokenClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"layers": ()}, "ascending indices below 3"),
        ({"layers": (1, 0)}, "ascending indices below 3"),
        ({"layers": (0, 3)}, "ascending indices below 3"),
        ({"where": "inside"}, "not 'inside'"),
    ],
)
def test_wrong_places_are_refused(wrong, words):
    with pytest.raises(LeanError, match=words):
        apply(TINY["bert"](), ReduceTokens(**{"layers": (0, 1), "rule": "page_rank", "settings": PRUNED, **wrong}))


def test_edits_that_would_break_it_are_refused_and_others_go_with_it():
    model = reduced("bert", "before_feed_forward")
    path = Anatomy.of(model).layers[0].path
    for one, words in (
        (edit(), "drops tokens already"),
        (SwapAttention(path=f"{path}.attention.self", mixer="top_k", settings={"k": 3}), "before reduce_tokens"),
        (DropSublayers(path=path, sublayers=("attention",)), "before reduce_tokens"),
        (DropSublayers(path=path, sublayers=("feed_forward",)), "before reduce_tokens"),
    ):
        with pytest.raises(LeanError, match=words):
            apply(model, one)
    batch = inputs(model, batch=3, length=9, padded=True)
    apply(model, KeepNeurons(path=path, size=8), keep=torch.arange(8))
    apply(model, DropLayers(keep=(1, 2)))  # the place of the first layer goes with it
    together = outputs(model, batch)
    torch.testing.assert_close(together[1:2, :], outputs(model, row(batch, 1)), rtol=1e-5, atol=1e-5)
    swapped = apply(TINY["bert"](), SwapAttention(path=f"{path}.attention.self", mixer="top_k", settings={"k": 3}))
    with pytest.raises(LeanError, match="holds a mixer"):
        apply(swapped, edit())


def test_another_attention_function_is_refused():
    model = reduced("vit")
    model.set_attn_implementation("sdpa")
    with pytest.raises(LeanError, match="holds a mixer"):
        outputs(model, inputs(model))
