"""What every edit owes on every family, alone and after others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from drawing import KINDS, draw, sequence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from families import ENCODER_DECODERS, TINY, inputs, outputs
from leanformers.anatomy import Anatomy
from leanformers.errors import LeanError
from leanformers.surgery import KeepHeads, QuantiseLinear, apply, ledger

pytest.importorskip("torchao")

CASES = [(family, kind) for family in TINY for kind in KINDS]
DECODERS = ("gpt2", "gpt-neox", "opt", "llama", "mistral", "qwen3", "gemma3", "phi3", "t5", "bart", "whisper")


def edited(family: str, *kinds: str, seed: int = 0):
    """A tiny model with these edits made; kinds that do not fit are left out. None if none fitted."""
    model, made = TINY[family](), 0
    for index, kind in enumerate(kinds):
        drawn = draw(model, kind, seed + index)
        if drawn is None:
            continue
        try:
            apply(model, drawn[0], **drawn[1])
            made += 1
        except LeanError:
            continue
    return model if made else None


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_parameters_and_flops_change_as_the_edit_says(family, kind):
    model = TINY[family]()
    drawn = draw(model, kind)
    if drawn is None:
        pytest.skip("the family has no place for this edit")
    before = Anatomy.of(model)
    count, layers, whole = before.parameters(), before.layer_flops(7), before.flops(7)
    cost = drawn[0].cost(before)
    apply(model, drawn[0], **drawn[1])
    after = Anatomy.of(model)
    assert after.parameters() - count == cost.parameters
    if kind == "slice_residual":  # heads and poolers are narrower too
        assert after.flops(7) - whole == cost.flops(7)
    elif kind != "keep_vocabulary":  # its FLOPs are the head's, not the layers'
        assert after.layer_flops(7) - layers == cost.flops(7)


def keep(model, family: str, case: Path) -> None:
    case.mkdir(parents=True)
    model.save_pretrained(case / "model")
    torch.save(outputs(model, inputs(model, padded=True)), case / "expected.pt")
    lean = "quantization_config" in json.loads((case / "model" / "config.json").read_text())
    record = [edit.to_json() for edit in ledger(model)] if lean else []  # a stock checkpoint has none
    about = {"class": type(model).__name__, "family": family, "ledger": record}
    about["names"] = sorted(model.state_dict())
    (case / "about.json").write_text(json.dumps(about))


def reload(root: Path, fresh) -> dict[str, str]:
    """Load every case in one fresh process, and save it again there; what failed, by name."""
    script = Path(__file__).with_name("reload.py")
    run = fresh.run([sys.executable, str(script), str(root)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_edit_on_every_family_reloads_to_the_bit_in_a_new_process(tmp_path, fresh):
    """The names are stable too, and a second save writes the same bytes."""
    for family, kind in CASES:
        model = edited(family, kind)
        if model is not None:
            keep(model, family, tmp_path / f"{family}-{kind}")
    assert reload(tmp_path, fresh) == {}


@pytest.mark.slow
@settings(
    max_examples=12,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(family=st.sampled_from(sorted(TINY)), seed=st.integers(0, 10_000), length=st.integers(2, 6))
def test_random_sequences_round_trip(tmp_path_factory, family, seed, length):
    model = TINY[family]()
    for index, kind in enumerate(sequence(model, seed, length)):
        drawn = draw(model, kind, seed + index)
        if drawn is None:
            continue
        before = Anatomy.of(model)
        try:
            cost = drawn[0].cost(before)
            count = before.parameters()
            apply(model, drawn[0], **drawn[1])
        except LeanError:
            continue  # one sentence, nothing changed: what does not go together is refused
        assert Anatomy.of(model).parameters() - count == cost.parameters
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    assert torch.equal(outputs(again, inputs(again, padded=True)), outputs(model, inputs(model, padded=True)))
    again.save_pretrained(folder / "again")
    for file in (folder / "again").iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes(), file.name


@pytest.mark.slow
def test_random_sequences_reload_to_the_bit_in_a_new_process(tmp_path, fresh):
    for seed, family in enumerate(TINY):
        model = edited(family, *sequence(None, seed, 5), seed=100 * seed)
        if model is not None:
            keep(model, family, tmp_path / family)
    assert reload(tmp_path, fresh) == {}


@pytest.mark.parametrize("family", DECODERS)
def test_generate_with_cache_equals_without(family):
    for kind in KINDS:
        model = edited(family, kind)
        if model is None or kind == "prune_prompt":  # prunes what it generates by its cache alone
            continue
        batch = inputs(model)
        if family in ENCODER_DECODERS:
            batch.pop("decoder_input_ids", None)
        options = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False)), (
            kind
        )


@pytest.mark.parametrize("family", TINY)
def test_masked_and_physically_smaller_models_agree(family):
    """Silencing a neuron's column of down, or a head's columns of output, is the same as cutting it."""
    small, whole = TINY[family](), TINY[family]()
    for kind in ("keep_neurons", "keep_heads"):
        drawn = draw(small, kind, seed=3)
        if drawn is None:
            continue
        edit, tensors = drawn
        anatomy = Anatomy.of(whole)
        with torch.no_grad():
            if kind == "keep_neurons":
                part = anatomy.feed_forward(edit.path)
                gone = sorted(set(range(part.intermediate_size)) - set(tensors["keep"].tolist()))
                part.down.weight()[:, gone] = 0
            else:
                attention = anatomy.attention(edit.path)
                width = attention.num_attention_heads // attention.num_key_value_heads * attention.head_dim
                for group in set(range(attention.num_key_value_heads)) - set(tensors["keep"].tolist()):
                    attention.output.weight()[:, group * width : (group + 1) * width] = 0
        apply(small, edit, **tensors)
    batch = inputs(small, padded=True)
    torch.testing.assert_close(outputs(small, batch), outputs(whole, batch), rtol=1e-4, atol=1e-4)


def test_a_cut_that_one_of_its_linears_refuses_changes_nothing():
    model = TINY["phi3"]()
    apply(model, QuantiseLinear(path="layers.0.self_attn.o_proj"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(LeanError, match=r"layers\.0\.self_attn\.o_proj is quantised"):
        apply(model, KeepHeads(path="layers.0.self_attn", size=1), keep=torch.tensor([0]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(ledger(model)) == 1
