"""Recipes: YAML both ways, refusals, running to a folder."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from leanformers import folders
from leanformers.errors import LeanError
from leanformers.methods import base, method, setting
from leanformers.recipe import Recipe, as_recipe, key_of, plain_step


@pytest.fixture(autouse=True)
def scale(monkeypatch):
    """A method that multiplies a number, so that order and settings show."""
    monkeypatch.setattr(base, "_registry", dict(base._registry))
    monkeypatch.setattr("leanformers.methods._registry", base._registry)

    @method("scale")
    @dataclass(frozen=True, kw_only=True)
    class Scale:
        by: float = setting(2.0, low=0.0)
        layers: tuple[int, ...] = ()

        def __call__(self, subject):
            import torch

            with torch.no_grad():
                for parameter in subject.model.parameters():
                    parameter.mul_(self.by).add_(torch.rand(()))

    return Scale


STEPS = ({"method": "scale", "by": 3.0, "layers": [0, 2]}, {"method": "scale"})


def test_yaml_round_trip(tmp_path):
    recipe = Recipe(model="minilm", task={"source": "train.csv", "text": "body"}, seed=3, steps=STEPS)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == Recipe.load(tmp_path) == recipe
    assert "dtype" not in recipe.to_yaml()
    other = Recipe(model="smollm2", dtype="float32", steps=())
    assert Recipe.from_yaml(other.to_yaml()) == other and other.key != recipe.key


def test_forms_of_a_recipe(scale):
    assert as_recipe([scale(by=3.0, layers=(0, 2)), scale()]).steps == STEPS
    assert as_recipe({"method": "scale"}) == as_recipe(scale()) == as_recipe([{"method": "scale"}])
    assert Recipe.from_yaml("- {method: scale, by: 3}").steps == ({"method": "scale", "by": 3},)
    assert key_of([{"method": "scale", "by": 1}]) == key_of([{"by": 1, "method": "scale"}])
    with pytest.raises(LeanError, match="not a registered method"):
        plain_step(dataclass(type("Plain", (), {}))())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [", "not valid YAML at line"),
        ("just words", "is no recipe"),
        ("stepps: []", "did you mean 'steps'"),
        ("model: minilm", "steps must be a list"),
        ("steps: {method: scale}", "steps must be a list"),
        ("steps: [scale]", "a mapping with 'method'"),
        ("steps: [{method: scal}]", "did you mean 'scale'"),
        ("steps: [{method: scale, bye: 1}]", "has no setting 'bye'"),
        ("steps: [{method: scale, by: -1}]", "at least 0.0, not -1"),
        ("seed: -1\nsteps: []", "seed must be"),
        ("seed: 1.5\nsteps: []", "seed must be"),
        ("task: {text: body}\nsteps: []", "needs 'source'"),
        ("task: 3\nsteps: []", "task must be"),
        ("model: [a]\nsteps: []", "model must be"),
        ("dtype: int8\nsteps: []", "dtype must be one of"),
        ("leanformers: 2\nsteps: []", "upgrade leanformers"),
        ("steps: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_bad_recipes_are_refused_in_one_sentence(text, words, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(LeanError, match=words) as caught:
        Recipe.load(tmp_path / "bad.yaml")
    assert "bad.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True])
def test_bad_seeds_are_refused_from_python_too(seed, model):
    from leanformers.recipe import apply

    with pytest.raises(LeanError, match="seed must be a whole number"):
        Recipe(seed=seed)
    with pytest.raises(LeanError, match="seed must be a whole number"):
        apply(STEPS, model, seed=seed)


@pytest.mark.parametrize("device", ["gpu0", "cuda:99", 1.5])
def test_devices_that_are_not_here_are_refused(device, model):
    from leanformers.recipe import apply

    with pytest.raises(LeanError, match="cannot be used here"):
        apply(STEPS, model, device=device)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LeanError, match="there is no recipe"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("model: Müller".encode("latin-1"))
    with pytest.raises(LeanError, match="not UTF-8"):
        Recipe.load(tmp_path / "latin.yaml")


# -- running ----------------------------------------------------------------------------------------------
@pytest.fixture
def model():
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    return BertModel(BertConfig(vocab_size=11, **sizes))


def same(a, b):
    import torch

    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_same_recipe_and_seed_give_the_same_model(model):
    import torch

    from leanformers.recipe import apply

    one = apply(STEPS, model, seed=5)
    torch.rand(7)
    assert same(one, apply(STEPS, model, seed=5))
    assert not same(one, apply(STEPS, model, seed=6)) and not same(one, model)
    # Going on from the first step's result is the same as running both in one go.
    assert same(one, apply(STEPS[1:], apply(STEPS[:1], model, seed=5), seed=5))
    before = copy.deepcopy(model)
    tokenizer = SimpleNamespace(pad_token_id=0)
    assert same(one, apply(STEPS, (model, tokenizer), seed=5)) and same(before, model)  # a pair's model stays too
    assert apply(STEPS, model, seed=5, copy_model=False) is model and same(one, model)


def test_run_writes_model_recipe_measurement_and_environment(model, tmp_path):
    from transformers import AutoModel

    from leanformers.recipe import run

    made, _ = run(STEPS, model, out=tmp_path / "lean", seed=4)
    held = {entry.name for entry in (tmp_path / "lean").iterdir()}
    assert {"config.json", "model.safetensors", "recipe.yaml", "measurement.json", "environment.json"} <= held
    assert "training" not in held
    assert Recipe.load(tmp_path / "lean").seed == 4
    assert json.loads((tmp_path / "lean" / "measurement.json").read_text())["parameters"] > 0
    assert same(AutoModel.from_pretrained(tmp_path / "lean"), made)
    run(STEPS[:1], model, out=tmp_path / "lean")  # its own folder may be written again
    assert len(Recipe.load(tmp_path / "lean").steps) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["lean"]


def test_an_output_folder_that_is_something_else_is_refused(model, tmp_path):
    from leanformers.recipe import run

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(LeanError, match="mine exists and is not a model that leanformers wrote"):
        run(STEPS, model, out=tmp_path / "mine")
    with pytest.raises(LeanError, match=r"thesis\.tex is a file"):
        run(STEPS, model, out=tmp_path / "mine" / "thesis.tex")
    with pytest.raises(LeanError, match="names no model"):
        run(STEPS)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(model, tmp_path, monkeypatch):
    from leanformers.recipe import run

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(LeanError, match=r"the disk that holds .*lean is full") as caught:
        run(STEPS, model, out=tmp_path / "lean")
    assert isinstance(caught.value, folders.DiskFull) and list(tmp_path.iterdir()) == []


def test_whole_folders_can_be_read_by_whom_new_files_can_be(tmp_path):
    (tmp_path / "plain").touch()
    with folders.whole(tmp_path / "model") as partial:
        (partial / "model.safetensors").touch(0o600)
    made = (tmp_path / "model" / "model.safetensors").stat().st_mode
    assert made == (tmp_path / "plain").stat().st_mode


def test_whole_folders_replace_old_ones_at_once(tmp_path):
    target = tmp_path / "point"
    with folders.whole(target) as partial:
        (partial / "a").write_text("1")
    with pytest.raises(KeyError), folders.whole(target) as partial:
        (partial / "b").write_text("2")
        raise KeyError
    assert [entry.name for entry in target.iterdir()] == ["a"]
    with folders.whole(target) as partial:
        (partial / "c").write_text("3")
    assert [entry.name for entry in target.iterdir()] == ["c"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["point"]
    folders.write_json(tmp_path / "x.json", {"a": float("nan"), "b": (1, None)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1, None]}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB, where this process may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting takes root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("size", [8, 64])
def test_a_disk_that_is_really_full(small_disk, size):
    from transformers import BertConfig, BertModel

    from leanformers.recipe import run

    fields = {"hidden_size": size, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": size}
    model = BertModel(BertConfig(vocab_size=11, max_position_embeddings=16, **fields))
    if size == 64:
        with pytest.raises(LeanError, match="is full: free some space"):
            run(STEPS, model, out=small_disk / "lean")
        assert list(small_disk.iterdir()) == []
    else:
        run(STEPS, model, out=small_disk / "lean")
        assert (small_disk / "lean" / "recipe.yaml").is_file()
