"""The command line: `leanformers slim`, `apply`, `export`, `measure`, `methods` and `advise`.

Commands import what they need when they run, so that `--help` and a wrong option answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leanformers import __version__
from leanformers.cli import options as opt
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
    model: opt.Model,
    task: opt.Task = None,
    data: opt.Data = None,
    text: opt.Text = None,
    label: opt.Label = None,
    query: opt.Query = None,
    body: opt.Body = None,
    kind: opt.Kind = None,
    validation: opt.Validation = None,
    test: opt.Test = None,
    size: opt.Size = None,
    max_length: opt.Length = None,
    metric: opt.Metric = None,
    drop_empty: opt.DropEmpty = False,
    encoding: opt.Encoding = None,
    delimiter: opt.Delimiter = None,
    goal: opt.Goal = None,
    out: opt.Run = None,
    trials: opt.Trials = None,
    finalists: opt.Finalists = None,
    points: opt.Points = None,
    minutes: opt.Minutes = None,
    method: opt.Method = None,
    estimate: opt.Estimate = None,
    validation_rows: opt.ValidationRows = None,
    test_rows: opt.TestRows = None,
    batch_size: opt.BatchSize = None,
    tune: opt.Tune = None,
    dtype: opt.Dtype = None,
    stock: opt.Stock = False,
    runtime: opt.Runtimes = None,
    seed: opt.Seed = 0,
    trust_remote_code: opt.Trust = False,
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
    task: opt.Task = None,
    data: opt.Data = None,
    text: opt.Text = None,
    label: opt.Label = None,
    query: opt.Query = None,
    body: opt.Body = None,
    kind: opt.Kind = None,
    validation: opt.Validation = None,
    test: opt.Test = None,
    size: opt.Size = None,
    max_length: opt.Length = None,
    metric: opt.Metric = None,
    drop_empty: opt.DropEmpty = False,
    encoding: opt.Encoding = None,
    delimiter: opt.Delimiter = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Instead of the recipe's own.", min=0, max=opt.LAST_SEED)
    ] = None,
    trust_remote_code: opt.Trust = False,
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
    to: Annotated[opt.Target, typer.Option("--to", help="What to write.")],
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
    task: opt.Task = None,
    data: opt.Data = None,
    text: opt.Text = None,
    label: opt.Label = None,
    query: opt.Query = None,
    body: opt.Body = None,
    kind: opt.Kind = None,
    test: opt.Test = None,
    max_length: opt.Length = None,
    metric: opt.Metric = None,
    drop_empty: opt.DropEmpty = False,
    encoding: opt.Encoding = None,
    delimiter: opt.Delimiter = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Test rows to measure quality on.", min=1)] = None,
    trust_remote_code: opt.Trust = False,
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
    task: opt.Task = None,
    data: opt.Data = None,
    text: opt.Text = None,
    label: opt.Label = None,
    query: opt.Query = None,
    body: opt.Body = None,
    kind: opt.Kind = None,
    test: opt.Test = None,
    max_length: opt.Length = None,
    metric: opt.Metric = None,
    drop_empty: opt.DropEmpty = False,
    encoding: opt.Encoding = None,
    delimiter: opt.Delimiter = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Another model, timed in turns with it and compared.")
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Time it without padding, against padded and length-sorted.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows of a timed batch.", min=1)] = 16,
    limit: Annotated[int | None, typer.Option("--limit", help="Test rows to use.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    dtype: opt.Dtype = None,
    runtime: opt.Runtime = None,
    seed: opt.Seed = 0,
    trust_remote_code: opt.Trust = False,
) -> None:
    """Measure a model's quality and cost, and change nothing."""
    from leanformers.cli.commands import run_measure, run_measure_everywhere, run_measure_packed, task_from

    chosen = task_from(
        task, data, kind, text=text, label=label, query=query, body=body, test=test, max_length=max_length,
        metric=metric, drop_empty=drop_empty, encoding=encoding, delimiter=delimiter,
    )  # fmt: skip
    where = runtime or ["torch"]
    several = len(where) > 1 or "all" in where
    if baseline is not None and (packed or several):
        raise typer.BadParameter("--packed and several runtimes compare a model with itself: leave --baseline out")
    if packed and several:
        raise typer.BadParameter("--packed compares in one runtime: name one, or leave --runtime out")
    if packed:
        run_measure_packed(
            model, chosen, batch_size=batch_size, dtype=dtype, runtime=where[0], as_json=as_json,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    elif several:
        run_measure_everywhere(
            model, chosen, where, batch_size=batch_size, limit=limit, dtype=dtype, seed=seed, as_json=as_json,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    else:
        run_measure(
            model, chosen, baseline=baseline, batch_size=batch_size, limit=limit, dtype=dtype, runtime=where[0],
            seed=seed, as_json=as_json, trust_remote_code=trust_remote_code,
        )  # fmt: skip


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None) -> None:
    """List the methods, or say all of one: what it needs and suits, its settings, its evidence."""
    from leanformers.cli.describe import show_method, show_methods

    show_method(name) if name else show_methods()


@app.command()
def advise(
    model: Annotated[str, typer.Argument(help="A folder, minilm, smollm2, or a name on the hub.")],
    task: opt.Task = None,
    length: Annotated[int, typer.Option("--length", help="Tokens of a typical input.", min=1)] = 128,
    trust_remote_code: opt.Trust = False,
) -> None:
    """Say which methods suit a model and what each is estimated to save, running none."""
    from leanformers.cli.commands import run_advise, task_from

    run_advise(model, task_from(task, None, None), length=length, trust_remote_code=trust_remote_code)


def main() -> None:
    """The entry point of the `leanformers` command."""
    app()
