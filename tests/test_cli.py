"""The command line: what it prints, and one clear sentence with code 2 for everything a user can mend."""

from __future__ import annotations

import errno
import io
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from sample import sample
from typer.testing import CliRunner

from leanformers.cli import app
from leanformers.cli.errors import sentence
from leanformers.errors import LeanError
from leanformers.runtimes import prepare

runner = CliRunner()


@pytest.fixture
def table(tmp_path):
    """A labelled CSV of thirty rows."""
    path = tmp_path / "train.csv"
    path.write_text("body,topic\n" + "\n".join(f"text number {i},{'ab'[i % 2]}" for i in range(30)) + "\n")
    return path


@pytest.fixture
def tiny_bert(tmp_path):
    """A folder with a random BERT and its tokenizer, some 200 kB."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "text", "number"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    folder = tmp_path / "tiny"
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def hurried(monkeypatch):
    """Timing as short as it can be."""
    from leanformers.deploy import exporting
    from leanformers.measure.run import compare, measure

    monkeypatch.setattr(exporting, "SECONDS", 0.1)
    for function in (compare, measure):
        monkeypatch.setitem(function.__kwdefaults__, "seconds", 0.1)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a small disk cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def refused(*arguments: object) -> str:
    """The sentence of a command that must end with code 2 and without a traceback."""
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output
    message = result.stderr.strip().splitlines()[-1]  # progress may stand before it
    assert message.startswith("error: ") and result.stderr.count("error: ") == 1, result.stderr
    return message.removeprefix("error: ")


def test_help_lists_the_commands():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("slim", "apply", "export", "measure", "methods", "advise"):
        assert command in result.output


def test_version():
    assert re.fullmatch(r"leanformers \d+\.\d+\.\d+\n", runner.invoke(app, ["--version"]).output)


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_missing_data_file(tmp_path):
    assert "nowhere.csv" in refused("slim", "--model", "minilm", "--data", tmp_path / "nowhere.csv", "--label", "topic")


def test_missing_column(table):
    message = refused("slim", "--model", "minilm", "--data", table, "--text", "boby", "--label", "topic")
    assert "'boby'" in message and "topic" in message


def test_one_class_only(tmp_path):
    path = tmp_path / "one.csv"
    path.write_text("text,label\n" + "a text,x\n" * 30)
    assert "one class only" in refused("slim", "--model", "minilm", "--data", path)


def test_empty_rows(tmp_path):
    path = tmp_path / "empty.csv"
    path.write_text("text,label\n" + "a text,x\nb,y\n" * 15 + ",x\n")
    assert "row 31" in refused("slim", "--model", "minilm", "--data", path)


def test_label_unseen_in_training(table, tmp_path):
    other = tmp_path / "test.csv"
    other.write_text("body,topic\nsomething,c\n")
    message = refused(
        "slim", "--model", "minilm", "--data", table, "--text", "body", "--label", "topic", "--test", other
    )
    assert "'c'" in message and "test.csv" in message


def test_not_utf8(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes("text,label\ncafé,x\nthé,y\n".encode("latin-1") * 20)
    assert "UTF-8" in refused("slim", "--model", "minilm", "--data", path)


def test_encoding_and_delimiter_can_be_said(tiny_bert, hurried, tmp_path):
    path = tmp_path / "excel.csv"
    path.write_bytes(("body;topic\n" + "text é;x\ntext ü;y\n" * 15).encode("cp1252"))
    data = ["measure", tiny_bert, "--data", path, "--text", "body", "--label", "topic"]
    assert "--encoding" in refused(*data)
    assert "pass delimiter=';' (--delimiter)" in refused(*data, "--encoding", "cp1252")
    found = runner.invoke(
        app, [str(a) for a in [*data, "--encoding", "cp1252", "--delimiter", ";", "--limit", "2", "--json"]]
    )
    assert found.exit_code == 0, found.output


def test_options_that_messages_name_exist():
    from pathlib import Path

    import typer

    import leanformers

    commands = typer.main.get_command(app).commands.values()
    known = {name for command in commands for option in command.params for name in option.opts}
    for path in Path(leanformers.__file__).parent.rglob("*.py"):
        named = set(re.findall(r"\((--[a-z-]+)[ )]", path.read_text("utf-8")))
        assert named <= known, f"{path}: {named - known}"


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_that_numpy_does_not_take(seed, tmp_path):
    commands = (["apply", tmp_path / "recipe.yaml"], ["slim", "--model", "minilm", "--task", "sentiment"])
    for command in commands:
        result = runner.invoke(app, [*map(str, command), "--out", str(tmp_path / "x"), "--seed", str(seed)])
        assert result.exit_code == 2 and "--seed" in result.output and not (tmp_path / "x").exists()


def test_directory_that_is_no_model(table, tmp_path):
    (tmp_path / "folder").mkdir()
    message = refused(
        "slim", "--model", tmp_path / "folder", "--data", table, "--text", "body", "--label", "topic",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert "no model" in message and not (tmp_path / "run" / "frontier.json").exists()


def test_folder_without_its_tokenizer(table, tiny_bert):
    for path in tiny_bert.glob("tokenizer*"):
        path.unlink()
    message = refused("measure", tiny_bert, "--data", table, "--text", "body", "--label", "topic")
    assert str(tiny_bert) in message and "no tokenizer" in message


def test_encoder_with_a_language_modelling_task(table, tiny_bert, tmp_path):
    message = refused(
        "slim", "--model", tiny_bert, "--data", table, "--text", "body", "--kind", "causal-lm", "--out", tmp_path / "run",
    )  # fmt: skip
    assert "encoder" in message and "causal-lm" in message


def test_full_disk(tiny_bert, small_disk, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: [{method: drop-layers, keep: 0.5}]")
    message = refused("apply", recipe, "--model", tiny_bert, "--out", small_disk / "lean")
    assert "full" in message and str(small_disk) in message
    assert list(small_disk.iterdir()) == []


def test_export_says_what_was_proved(tiny_bert, hurried, table, tmp_path):
    data = ["--data", table, "--text", "body", "--label", "topic"]
    out = tmp_path / "served"
    result = runner.invoke(app, [str(a) for a in ("export", tiny_bert, "--to", "stock", "--out", out, *data)])
    assert result.exit_code == 0, result.output
    assert "Proved in a fresh process on 4 batches" in result.output and (out / "leanformers.json").is_file()
    assert "exists and is not an empty place" in refused("export", tiny_bert, "--to", "stock", "--out", out, *data)


def test_export_wants_a_task_and_a_format_that_there_is(tiny_bert, tmp_path):
    out = tmp_path / "served"
    assert "holds no recipe with a task: say" in refused("export", tiny_bert, "--to", "stock", "--out", out)
    assert "nowhere is no folder: say" in refused("export", "nowhere", "--to", "stock", "--out", out)
    told = refused("export", tiny_bert, "--to", "stock", "--out", out, "--quantize", "q8_0")
    assert told == "an export to stock cannot be quantised as 'q8_0'; there is none"
    assert not out.exists()


def test_a_proof_that_fails_ends_with_code_1(tiny_bert, table, tmp_path, monkeypatch):
    from leanformers.deploy.proof import ProofError

    def differs(*args, **options):
        raise ProofError("the export to stock does not answer as its source")

    monkeypatch.setattr("leanformers.deploy.exporting.prove", differs)
    out = tmp_path / "served"
    data = ["--data", table, "--text", "body", "--label", "topic"]
    result = runner.invoke(app, [str(a) for a in ("export", tiny_bert, "--to", "stock", "--out", out, *data)])
    assert result.exit_code == 1 and "does not answer as its source" in result.stderr and not out.exists()


def test_apply_says_how_to_load(tiny_bert, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: [{method: drop-layers, keep: 0.5}]")
    result = runner.invoke(app, ["apply", str(recipe), "--model", str(tiny_bert), "--out", str(tmp_path / "lean")])
    assert result.exit_code == 0, result.exception
    assert "stock" in result.output and (tmp_path / "lean" / "recipe.yaml").is_file()


def test_apply_says_in_words_that_zeros_save_nothing(tiny_bert, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: [{method: essential-sparsity, sparsity: 0.9}]")
    result = runner.invoke(app, ["apply", str(recipe), "--model", str(tiny_bert), "--out", str(tmp_path / "lean")])
    assert result.exit_code == 0, result.exception
    assert "that essential-sparsity set to zero save no bytes and no time" in result.output


def test_measure_in_several_runtimes(tiny_bert, hurried, table, monkeypatch):
    from leanformers.measure import everywhere as room

    data = ["--data", str(table), "--text", "body", "--label", "topic", "--limit", "4"]
    result = runner.invoke(app, ["measure", str(tiny_bert), *data, "--runtime", "torch-packed", "--runtime", "torch"])
    assert result.exit_code == 0, result.exception
    assert result.output.index("torch  ") < result.output.index("torch-packed")  # ratios are to torch
    monkeypatch.setattr(room, "available", lambda: ["torch", "llama.cpp"])
    monkeypatch.setattr(room, "check", lambda name: None)
    monkeypatch.setattr(room, "prepare", lambda *a: _refuses() if a[2] == "llama.cpp" else prepare(*a))
    result = runner.invoke(app, ["measure", str(tiny_bert), *data, "--runtime", "all", "--json"])
    record = json.loads(result.stdout)
    assert list(record["measurements"]) == ["torch"] and record["refused"] == {"llama.cpp": "it runs decoders alone"}
    assert "there is no runtime 'nope'" in refused("measure", tiny_bert, *data, "--runtime", "all", "--runtime", "nope")
    assert "give --task NAME" in refused("measure", tiny_bert, "--runtime", "all")


def _refuses():
    raise LeanError("it runs decoders alone")


def test_a_head_of_random_numbers_is_said(tiny_bert, hurried, table, tmp_path):
    from transformers import AutoModel

    shutil.copytree(tiny_bert, tmp_path / "body")
    AutoModel.from_pretrained(tiny_bert).save_pretrained(tmp_path / "body")
    data = ["--data", str(table), "--text", "body", "--label", "topic", "--limit", "4"]
    told = {
        name: " ".join(runner.invoke(app, ["measure", str(folder), *data]).stderr.split())
        for name, folder in (("body", tmp_path / "body"), ("whole", tiny_bert))
    }
    assert "has no head for this task" in told["body"] and "no head" not in told["whole"]


def test_measure_against_a_baseline(tiny_bert, hurried, table):
    data = ["--data", str(table), "--text", "body", "--label", "topic", "--limit", "4"]
    result = runner.invoke(app, ["measure", str(tiny_bert), *data, "--baseline", str(tiny_bert), "--json"])
    assert result.exit_code == 0, result.exception
    record = json.loads(result.stdout)
    assert record["measurement"]["parameters"] == record["baseline"]["parameters"] > 0
    assert record["ratios"]["quality"] == 1.0 and record["environment"]["hardware"]["cpu"]


def test_weights_are_measured_and_advised_on_as_they_are_stored(tiny_bert, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from leanformers import measure

    half = tmp_path / "half"
    shutil.copytree(tiny_bert, half)
    AutoModelForSequenceClassification.from_pretrained(tiny_bert, dtype="bfloat16").save_pretrained(half)

    def memory(*options):
        result = runner.invoke(app, ["measure", str(half), "--json", *options])
        assert result.exit_code == 0, result.exception
        return json.loads(result.stdout)["measurement"]["memory"]

    assert memory() == measure(str(half)).memory < 0.6 * memory("--dtype", "float32")
    assert "dtype is one of" in refused("measure", half, "--dtype", "int8")
    stored, whole = (runner.invoke(app, ["advise", str(folder)]).output for folder in (half, tiny_bert))
    assert stored != whole  # bytes of half precision


@pytest.mark.parametrize("with_baseline", [False, True])
def test_measurement_as_a_table(with_baseline):
    from rich.console import Console

    from leanformers.cli import tables
    from leanformers.measure import Measurement

    known = {
        "memory": 2_000_000,
        "metric": "accuracy",
        "metrics": {"accuracy": 0.8, "macro_f1": 0.75},
        "latency_p95": 0.02,
    }
    found = Measurement(parameters=500_000, bytes=1_000_000, quality=0.8, latency=0.01, **known)
    other = Measurement(parameters=1_000_000, bytes=2_000_000, quality=0.8, latency=0.02, **known)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(tables.measurement(found, other if with_baseline else None, "lean", "before"))
    text = console.export_text()
    for wanted in ("accuracy", "0.800", "macro f1", "0.75", "10.0 ms", "20.0 ms", "500 k", "1.00 MB"):
        assert wanted in text
    assert ("0.50×" in text) == ("before" in text) == with_baseline
    assert "throughput" not in text  # not measured


def test_advise_estimates_without_running(tiny_bert):
    result = runner.invoke(app, ["advise", str(tiny_bert)])
    assert result.exit_code == 0, result.exception
    text = " ".join(result.output.split())
    for wanted in ("drop-layers", "quantization", "0.5", "×", "128 tokens", "not estimated"):
        assert wanted in text


def test_goal_that_cannot_be_parsed(table, tmp_path):
    message = refused(
        "slim", "--model", "minilm", "--data", table, "--text", "body", "--label", "topic", "--goal", "faster please",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert "'faster please'" in message and "quality" in message


def test_output_folder_that_is_no_run(table, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("precious")
    message = refused(
        "slim", "--model", "minilm", "--data", table, "--text", "body", "--label", "topic", "--out", taken
    )
    assert str(taken) in message and (taken / "thesis.txt").read_text() == "precious"


def test_unknown_method_in_a_search(table, tmp_path):
    message = refused(
        "slim", "--model", "minilm", "--data", table, "--text", "body", "--label", "topic", "--method", "distilation",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert "distillation" in message


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("steps: [{method: quantisation}]", "quantization"),
        ("steps: [{method: quantization, shceme: int8_dynamic}]", "scheme"),
        ("steps: [{method: quantization, scheme: int3}]", "int8_weight_only"),
        ("steps: {", "YAML"),
        ("model: minilm", "steps"),
    ],
)
def test_bad_recipe(text, wanted, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    message = refused("apply", path, "--model", "minilm", "--out", tmp_path / "lean")
    assert wanted in message and not (tmp_path / "lean").exists()


def test_missing_recipe(tmp_path):
    assert "no.yaml" in refused("apply", tmp_path / "no.yaml", "--out", tmp_path / "lean")


def test_unknown_task():
    assert "sentiment" in refused("measure", "minilm", "--task", "sentimnet")


def test_task_and_data_together(table):
    assert "--data" in refused("measure", "minilm", "--task", "sentiment", "--data", table)


def test_columns_without_data():
    assert "--text" in refused("measure", "minilm", "--text", "body")


def test_unknown_method():
    assert "did you mean 'quantization'" in refused("methods", "quantisation")


def test_slim_wants_a_task():
    result = runner.invoke(app, ["slim", "--model", "minilm"])
    assert result.exit_code == 2 and "--task" in result.output


def test_whole_process_ends_with_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "leanformers.cli", "apply", str(tmp_path / "no.yaml"), "--out", str(tmp_path / "x")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---- which errors are sentences ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (LeanError("a\n  sentence"), "a sentence"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.csv"), "x.csv does not exist: check the path"),
        (PermissionError(errno.EACCES, "denied", "x.csv"), "x.csv may not be read or written by you: check its permissions"),
        (IsADirectoryError(errno.EISDIR, "is dir", "x"), "x is a folder, and a file is wanted"),
        (FileExistsError(errno.EEXIST, "exists", "x"), "x is there already: choose another place"),
        (ModuleNotFoundError("No module", name="torchao.quant"), "the package 'torchao' is not installed: pip install it"),
        (RuntimeError("a fault of ours"), None),
        (ModuleNotFoundError("No module", name="leanformers.nonsense"), None),
        (BrokenPipeError(), None),
    ],
)  # fmt: skip
def test_sentences(error, wanted):
    assert sentence(error) == wanted


def test_full_disk_is_said():
    assert "is full" in sentence(OSError(errno.ENOSPC, "No space left on device", "run/x"))
    assert "is full" in sentence(RuntimeError("database or disk is full"))


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("leanformers.cli.describe.show_methods", lambda: 1 / 0)
    assert isinstance(runner.invoke(app, ["methods"]).exception, ZeroDivisionError)


# ---- what is printed ---------------------------------------------------------------------------------------------


def test_methods_are_listed_with_what_they_need():
    result = runner.invoke(app, ["methods"])
    assert result.exit_code == 0
    for wanted in (
        "distillation",
        "quantization",
        "essential-sparsity",
        "needs",
        "suits",
        "evidence",
        "smaller layers",
    ):
        assert wanted in result.output  # names whole, on eighty columns


def test_one_method_in_full():
    result = runner.invoke(app, ["methods", "quantization"])
    assert result.exit_code == 0
    for wanted in ("scheme", "int8_dynamic", "torchao", "needs", "suits", "vidence"):
        assert wanted in result.output


@pytest.fixture
def pretend_search(monkeypatch, tmp_path):
    """A search that writes the made-up run at once, and is told what it was asked for."""
    asked = {}

    def slim(model, task, **options):
        asked.update(options, model=model, task=task)
        options["out"].mkdir(parents=True)
        (options["out"] / "frontier.json").write_text(json.dumps(sample() | {"status": asked_status[0]}))
        return SimpleNamespace(folder=options["out"], status=asked_status[0])

    asked_status = ["complete"]
    import leanformers.frontier

    monkeypatch.setattr(leanformers.frontier, "slim", slim, raising=False)
    return asked, asked_status


def slim_arguments(table, out):
    return [
        "slim",
        "--model",
        "minilm",
        "--data",
        str(table),
        "--text",
        "body",
        "--label",
        "topic",
        "--out",
        str(out),
    ]


def test_slim_prints_table_report_and_two_lines(table, tmp_path, pretend_search):
    asked, _ = pretend_search
    out = tmp_path / "run"
    more = [
        "--goal",
        "latency<=0.5x",
        "--goal",
        "quality>=0.99x",
        "--trials",
        "3",
        "--method",
        "idt5",
        "--method",
        "optin",
    ]
    result = runner.invoke(app, [*slim_arguments(table, out), *more])
    assert result.exit_code == 0, result.exception
    for wanted in (
        "0.78×",
        "41.2 ms",
        "90.9 MB",
        "22.7 M",
        "21.5 M",
        "TF-IDF",
        "baseline",
        "stock",
        "lean",
        "report.html",
    ):
        assert wanted in result.output, wanted
    lines = [line.strip() for line in result.output.splitlines() if line.startswith("    ")]
    best = out / "points" / "idt5+optin+distillation+quantization-p3"
    assert lines[-2] == "import leanformers, transformers"
    assert lines[-1].startswith(f"print(transformers.pipeline('text-classification', '{best}')(")
    for line in lines[-2:]:
        compile(line, "pasted", "exec")
    assert asked["goals"] == ["latency<=0.5x", "quality>=0.99x"] and asked["trials"] == 3
    assert asked["methods"] == ["idt5", "optin"] and asked["task"].labels == ["a", "b"]
    assert "finalists" not in asked  # the search's own default


def test_goals_that_no_point_reaches_are_said(capsys, tmp_path):
    from leanformers.cli.commands import show_frontier
    from leanformers.cli.console import out

    out.cache_clear()
    show_frontier(sample() | {"goals": ["latency<=0.0001x", "quality>=0.1x"]}, tmp_path)
    assert "Not reached: latency ≤ 0.0001×." in capsys.readouterr().out
    out.cache_clear()


def test_interruption_shows_what_is_there_and_ends_with_130(table, tmp_path, pretend_search):
    pretend_search[1][0] = "interrupted"
    result = runner.invoke(app, slim_arguments(table, tmp_path / "run"))
    assert result.exit_code == 130
    assert "0.78×" in result.output and "interrupted" in result.output


@pytest.mark.parametrize("kind", ["text-classification", "text-regression", "embedding", "causal-lm", "masked-lm"])
@pytest.mark.parametrize("tier", ["stock", "lean"])
def test_load_lines_are_two_lines_of_python(kind, tier):
    from leanformers.report.snippets import load_lines

    lines = load_lines("it's/a folder", kind, tier)
    assert len(lines) == 2 and ("leanformers" in lines[0]) == (tier == "lean")
    compile("\n".join(lines), "pasted", "exec")
