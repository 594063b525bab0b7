"""The command line: `leanformers slim`, `apply`, `export`, `measure`, `methods` and `advise`.

Commands import what they need when they run, so that `--help` and a wrong option answer at once.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from leanformers import __version__
from leanformers.cli.errors import Commands

app = typer.Typer(
    name="leanformers",
    cls=Commands,
    help="Make a transformer you already have cheap to tune, to store and to run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class Kind(StrEnum):
    """The kinds of task that can be made of one's own data."""

    text_classification = "text-classification"
    text_regression = "text-regression"
    embedding = "embedding"
    causal_lm = "causal-lm"
    masked_lm = "masked-lm"


class Target(StrEnum):
    """What a model can be exported to."""

    onnx = "onnx"
    openvino = "openvino"
    gguf = "gguf"
    torch = "torch"
    stock = "stock"


_DATA, _SEARCH = "Data", "Search"
_LAST_SEED = 2**32 - 1  # numpy takes no larger one
ModelOption = Annotated[
    str,
    typer.Option("--model", help="A folder, [b]minilm[/b], [b]smollm2[/b], or a name on the hub.", show_default=False),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task", help="A packaged task: sentiment, docstrings-search, docstrings-lm …", rich_help_panel=_DATA
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Your own: a CSV, JSON Lines or Parquet file, a folder, or a data set on the hub.",
        rich_help_panel=_DATA,
    ),
]
TextOption = Annotated[str | None, typer.Option("--text", help="Column of the texts.", rich_help_panel=_DATA)]
LabelOption = Annotated[str | None, typer.Option("--label", help="Column of the labels.", rich_help_panel=_DATA)]
QueryOption = Annotated[
    str | None, typer.Option("--query", help="Column of the queries, for search.", rich_help_panel=_DATA)
]
BodyOption = Annotated[
    str | None, typer.Option("--body", help="Column of what they should find.", rich_help_panel=_DATA)
]
KindOption = Annotated[
    Kind | None,
    typer.Option("--kind", help="What to do with --data; told from the columns.", rich_help_panel=_DATA),
]
ValidationOption = Annotated[
    str | None,
    typer.Option("--validation", help="Split or file to choose by; else a share of --data.", rich_help_panel=_DATA),
]
TestOption = Annotated[
    str | None,
    typer.Option("--test", help="Split or file to measure on; else a share of --data.", rich_help_panel=_DATA),
]
SizeOption = Annotated[int | None, typer.Option("--size", help="Training rows to use.", min=2, rich_help_panel=_DATA)]
LengthOption = Annotated[
    int | None, typer.Option("--max-length", help="Longest input in tokens.", min=4, rich_help_panel=_DATA)
]
MetricOption = Annotated[str | None, typer.Option("--metric", help="What counts as quality.", rich_help_panel=_DATA)]
DropEmptyOption = Annotated[
    bool, typer.Option("--drop-empty", help="Leave out rows with empty values.", rich_help_panel=_DATA)
]
EncodingOption = Annotated[
    str | None, typer.Option("--encoding", help="Of a text file that is not UTF-8.", rich_help_panel=_DATA)
]
DelimiterOption = Annotated[
    str | None, typer.Option("--delimiter", help="Of a CSV file without commas.", rich_help_panel=_DATA)
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a model from the hub.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Same seed, same result.", min=0, max=_LAST_SEED)]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="Load the weights as float32, bfloat16 or float16; else as they are stored."),
]
RuntimeOption = Annotated[
    str, typer.Option("--runtime", help="Where the model runs: torch, torch-compile, onnxruntime, openvino …")
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"leanformers {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results alone.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more of what is done.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    from leanformers.cli.console import set_up

    set_up(quiet=quiet, verbose=verbose)


@app.command()
def slim(
    model: ModelOption,
    task: TaskOption = None,
    data: DataOption = None,
    text: TextOption = None,
    label: LabelOption = None,
    query: QueryOption = None,
    body: BodyOption = None,
    kind: KindOption = None,
    validation: ValidationOption = None,
    test: TestOption = None,
    size: SizeOption = None,
    max_length: LengthOption = None,
    metric: MetricOption = None,
    drop_empty: DropEmptyOption = False,
    encoding: EncodingOption = None,
    delimiter: DelimiterOption = None,
    goal: Annotated[
        list[str] | None,
        typer.Option(
            "--goal",
            help='As often as you like: "latency<=0.5x", "quality>=0.99x", "bytes<=20e6".',
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run; the same command again goes on with it.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", help="Recipes to try.", min=1, rich_help_panel=_SEARCH)
    ] = None,
    finalists: Annotated[
        int | None,
        typer.Option("--finalists", help="Trainings in full, of the most promising.", min=0, rich_help_panel=_SEARCH),
    ] = None,
    points: Annotated[
        int | None,
        typer.Option("--points", help="Checkpoints to keep at most.", min=1, rich_help_panel=_SEARCH),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", help="Time to spend; what is under way is ended.", rich_help_panel=_SEARCH),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="Search among these methods only (repeatable).", rich_help_panel=_SEARCH),
    ] = None,
    estimate: Annotated[
        int | None,
        typer.Option("--estimate", help="Training examples of an estimate; 0: none.", min=0, rich_help_panel=_SEARCH),
    ] = None,
    validation_rows: Annotated[
        int | None,
        typer.Option("--validation-rows", help="Rows that estimates are compared on.", min=1, rich_help_panel=_SEARCH),
    ] = None,
    test_rows: Annotated[
        int | None,
        typer.Option("--test-rows", help="Rows of the last measurement; else all.", min=1, rich_help_panel=_SEARCH),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Rows of a timed batch.", min=1, rich_help_panel=_SEARCH)
    ] = None,
    tune: Annotated[
        bool | None,
        typer.Option(
            "--tune/--no-tune",
            help="Fine-tune the model first; else only where its head is new.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    dtype: DtypeOption = None,
    stock: Annotated[
        bool, typer.Option("--stock", help="Only models that transformers loads alone.", rich_help_panel=_SEARCH)
    ] = False,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            help="What serves it, such as openvino-int8: baseline, goals and search are of it. Beside torch, or after "
            "another: the points are measured there too. all: everything here. Else torch, then what is installed.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    seed: SeedOption = 0,
    trust_remote_code: TrustOption = False,
) -> None:
    """Search for lean versions of a model, and show the [b]frontier[/b] of quality against cost.

    [b]leanformers slim --model ./my-bert --data train.csv --label topic --goal "latency<=0.5x"[/b]
    """
    from leanformers.cli.commands import run_slim, task_from

    chosen = task_from(
        task, data, kind, text=text, label=label, query=query, body=body, validation=validation,
        test=test, size=size, max_length=max_length, metric=metric, drop_empty=drop_empty, encoding=encoding,
        delimiter=delimiter,
    )  # fmt: skip
    if chosen is None:
        raise typer.BadParameter("say what the model is for: --task NAME, or --data FILE with its columns")
    run_slim(
        model, chosen, out=out, goals=goal or [], trials=trials, finalists=finalists, points=points,
        minutes=minutes, methods=method or None, estimate=estimate, validation=validation_rows, test=test_rows,
        batch_size=batch_size, tune=tune, dtype=dtype, runtime=_runtimes(runtime), stock=stock, seed=seed,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


def _runtimes(given: list[str] | None) -> str | list[str]:
    if not given:
        return "auto"
    return given[0] if len(given) == 1 else given


@app.command()
def apply(
    recipe: Annotated[Path, typer.Argument(help="recipe.yaml, or the folder that holds one.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the lean model.")],
    model: Annotated[str | None, typer.Option("--model", help="Instead of the recipe's own.")] = None,
    task: TaskOption = None,
    data: DataOption = None,
    text: TextOption = None,
    label: LabelOption = None,
    query: QueryOption = None,
    body: BodyOption = None,
    kind: KindOption = None,
    validation: ValidationOption = None,
    test: TestOption = None,
    size: SizeOption = None,
    max_length: LengthOption = None,
    metric: MetricOption = None,
    drop_empty: DropEmptyOption = False,
    encoding: EncodingOption = None,
    delimiter: DelimiterOption = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Instead of the recipe's own.", min=0, max=_LAST_SEED)
    ] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Make one recipe's lean model, without a search."""
    from leanformers.cli.commands import run_apply, task_from

    chosen = task_from(
        task, data, kind, text=text, label=label, query=query, body=body, validation=validation,
        test=test, size=size, max_length=max_length, metric=metric, drop_empty=drop_empty, encoding=encoding,
        delimiter=delimiter,
    )  # fmt: skip
    run_apply(recipe, out, model=model, task=chosen, seed=seed, trust_remote_code=trust_remote_code)


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="A folder (a point of a run, say), minilm, smollm2, or a name on the hub.")
    ],
    to: Annotated[Target, typer.Option("--to", help="What to write.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the export, which must not exist.")],
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", help="onnx, openvino: int8; gguf: q8_0, q6_k, q5_k_m, q4_k_m."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop", help="openvino's int8: share of the quality that it may cost, such as 0.01. It takes a while."
        ),
    ] = None,
    task: TaskOption = None,
    data: DataOption = None,
    text: TextOption = None,
    label: LabelOption = None,
    query: QueryOption = None,
    body: BodyOption = None,
    kind: KindOption = None,
    test: TestOption = None,
    max_length: LengthOption = None,
    metric: MetricOption = None,
    drop_empty: DropEmptyOption = False,
    encoding: EncodingOption = None,
    delimiter: DelimiterOption = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Test rows to measure quality on.", min=1)] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write a model for the runtime that serves it, and prove that it answers as before.

    [b]leanformers export runs/mine/points/NAME --to openvino --out served/[/b]
    """
    from leanformers.cli.commands import run_export, task_from

    chosen = task_from(
        task, data, kind, text=text, label=label, query=query, body=body, test=test, max_length=max_length,
        metric=metric, drop_empty=drop_empty, encoding=encoding, delimiter=delimiter,
    )  # fmt: skip
    run_export(
        model, str(to), out, quantize=quantize, max_drop=max_drop, task=chosen, limit=limit,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help="A folder, minilm, smollm2, or a name on the hub.")],
    task: TaskOption = None,
    data: DataOption = None,
    text: TextOption = None,
    label: LabelOption = None,
    query: QueryOption = None,
    body: BodyOption = None,
    kind: KindOption = None,
    test: TestOption = None,
    max_length: LengthOption = None,
    metric: MetricOption = None,
    drop_empty: DropEmptyOption = False,
    encoding: EncodingOption = None,
    delimiter: DelimiterOption = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Another model, timed in turns with it and compared.")
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Time it without padding, against padded and length-sorted.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows of a timed batch.", min=1)] = 16,
    limit: Annotated[int | None, typer.Option("--limit", help="Test rows to use.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    dtype: DtypeOption = None,
    runtime: RuntimeOption = "torch",
    seed: SeedOption = 0,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure a model's quality and cost, and change nothing."""
    from leanformers.cli.commands import run_measure, run_measure_packed, task_from

    chosen = task_from(
        task, data, kind, text=text, label=label, query=query, body=body, test=test, max_length=max_length,
        metric=metric, drop_empty=drop_empty, encoding=encoding, delimiter=delimiter,
    )  # fmt: skip
    if packed:
        if baseline is not None:
            raise typer.BadParameter("--packed compares a model with itself: leave --baseline out")
        run_measure_packed(
            model, chosen, batch_size=batch_size, dtype=dtype, runtime=runtime, as_json=as_json,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        return
    run_measure(
        model, chosen, baseline=baseline, batch_size=batch_size, limit=limit, dtype=dtype, runtime=runtime, seed=seed,
        as_json=as_json, trust_remote_code=trust_remote_code,
    )  # fmt: skip


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None) -> None:
    """List the methods, or say all of one: what it needs and suits, its settings, its evidence."""
    from leanformers.cli.describe import show_method, show_methods

    show_method(name) if name else show_methods()


@app.command()
def advise(
    model: Annotated[str, typer.Argument(help="A folder, minilm, smollm2, or a name on the hub.")],
    task: TaskOption = None,
    length: Annotated[int, typer.Option("--length", help="Tokens of a typical input.", min=1)] = 128,
    trust_remote_code: TrustOption = False,
) -> None:
    """Say which methods suit a model and what each is estimated to save, running none."""
    from leanformers.cli.commands import run_advise, task_from

    run_advise(model, task_from(task, None, None), length=length, trust_remote_code=trust_remote_code)


def main() -> None:
    """The entry point of the `leanformers` command."""
    app()
