"""What the commands do, once their options are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from leanformers.cli.console import out as console
from leanformers.cli.console import quiet, silence_transformers
from leanformers.cli.errors import INTERRUPTED
from leanformers.errors import LeanError


def task_from(task: str | None, data: str | None, kind: Any = None, **options: Any) -> Any:
    """The Task that the options name; None if they name none.

    Raises:
        LeanError: options that do not go together, or what `leanformers.tasks.task` says of the data.
    """
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    if kind is not None:
        given["kind"] = str(kind)
    if task is not None and data is not None:
        raise LeanError("--task names packaged data and --data your own: give one of them (and --kind with --data)")
    source = data if data is not None else task
    if source is None:
        if given:
            raise LeanError(
                f"--{next(iter(given)).replace('_', '-')} belongs to a task: give --data FILE or --task NAME"
            )
        return None
    from leanformers.tasks import task as make

    return make(source, **given)


def run_slim(model: str, task: Any, *, out: Path | None, **options: Any) -> None:
    """Search, then print the frontier, where the report is, and how to load the best point."""
    from leanformers.frontier import slim

    silence_transformers()
    given = {name: value for name, value in options.items() if value is not None}
    frontier = slim(model, task, out=out, progress=not quiet(), **given)
    data = json.loads((frontier.folder / "frontier.json").read_text("utf-8"))
    show_frontier(data, frontier.folder)
    if frontier.status == "interrupted":
        raise typer.Exit(INTERRUPTED)


def show_frontier(data: dict[str, Any], out: Path) -> None:
    """Print the table of a run's points, its report and the two lines that load the best point."""
    from leanformers.cli import tables
    from leanformers.report import view

    screen = console()
    screen.print(tables.frontier(data))
    if data.get("status") == "interrupted":
        screen.print("The search was interrupted; the same command goes on with it.", style="yellow")
    if missed := [goal["text"] for goal in view.goal_limits(data) if not (goal["met"] or goal["base"])]:
        screen.print(f"Not reached: {', '.join(missed)}.", style="yellow", soft_wrap=True)
    elif view.at_odds(data):
        screen.print("Each goal is reached by some point, and no point reaches them all.", style="yellow")
    screen.print(f"Report: {out / 'report.html'}", markup=False, soft_wrap=True)
    points = {point["name"]: point for point in data.get("points", ()) if point.get("status") == "frontier"}
    best = points.get(data.get("best") or "") or data["baseline"]
    if not best.get("folder"):
        return
    what = f"the best point, {best['name']}" if best is not data["baseline"] else "the baseline, which no recipe beats"
    screen.print(f"\nTo use {what}, in Python:\n", markup=False, soft_wrap=True)
    for line in view.row(data, best, out)["lines"]:
        screen.print(f"    {line}", markup=False, soft_wrap=True)


def run_apply(
    recipe: Path, out: Path, *, model: str | None, task: Any, seed: int | None, trust_remote_code: bool
) -> None:
    """Make a recipe's model in a folder, and say how to load it."""
    from leanformers.recipe import Recipe, run, task_of
    from leanformers.report.snippets import load_lines
    from leanformers.report.zeros import zeros
    from leanformers.surgery import tier

    silence_transformers()
    read = Recipe.load(recipe)
    chosen = task_of(read.task) if task is None else task
    source: Any = model or read.model
    if trust_remote_code and source is not None:
        from leanformers.tasks import load

        source = load(source, chosen, trust_remote_code=True)
    lean, _ = run(read, source, chosen, out=out, seed=seed, progress=True)
    screen = console()
    screen.print(f"\n{out} holds the {tier(lean)} model, its recipe and its measurement.", markup=False, soft_wrap=True)
    if told := zeros(read.steps):
        screen.print(told, markup=False, soft_wrap=True)
    if chosen is not None:
        for line in load_lines(str(out), chosen.kind, tier(lean)):
            screen.print(f"    {line}", markup=False, soft_wrap=True)


def run_export(model: str, to: str, out: Path, **options: Any) -> None:
    """Export, then say what was proved and what it costs there."""
    from leanformers.cli import tables
    from leanformers.deploy import export
    from leanformers.measure.environment import describe

    silence_transformers()
    done = export(model, to, out, **options)
    screen = console()
    if done.measurement is not None:
        screen.print(tables.measurement(done.measurement, done.source, to, "torch"))
    proof = done.proof
    if done.quantize is None:
        told = f"outputs differ by at most {proof.difference:.1e} of their scale"
    else:
        told = "it answers as it did where it was written; what the quantisation cost stands in the table"
    screen.print(
        f"Proved in a fresh process on {proof.cases} batches: {told}.\n"
        f"{out} holds the export and its record, leanformers.json.",
        markup=False,
        soft_wrap=True,
    )
    screen.print(describe(), style="dim", markup=False)


def run_measure(
    model: str,
    task: Any,
    *,
    baseline: str | None,
    as_json: bool,
    dtype: str | None,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Measure one model, or one against another in the same rounds."""
    from leanformers.measure import compare, environment, measure
    from leanformers.measure.environment import describe

    silence_transformers()

    def loaded(name: str) -> Any:
        return _loaded(name, task, dtype, trust_remote_code)

    folders = {key: name for key, name in (("baseline", baseline), ("model", model)) if name and Path(name).is_dir()}
    other = None
    if baseline is None:
        found = measure(loaded(model), task, folder=folders.get("model"), **options)
    else:
        if task is None:
            raise LeanError("--baseline compares on a task: give --task NAME or --data FILE")
        pair = {"baseline": loaded(baseline), "model": loaded(model)}
        both = compare(pair, task, folders=folders, **options)
        found, other = both["model"], both["baseline"]
    if as_json:
        record = {"model": model, "measurement": found.to_json(), "environment": environment()}
        if other is not None:
            record |= {"baseline": other.to_json(), "ratios": found.ratios(other)}
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
        return
    from leanformers.cli import tables

    console().print(tables.measurement(found, other, model, baseline or ""))
    console().print(describe(), style="dim", markup=False)


def _loaded(name: str, task: Any, dtype: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """The model and its tokenizer; a head that would answer at random is said."""
    from leanformers.tasks import load
    from leanformers.tasks.loading import warn_of_new_head

    pair = load(name, task, _dtype(dtype), trust_remote_code=trust_remote_code)
    warn_of_new_head(pair[0], name)
    return pair


def _dtype(given: str | None) -> str:
    """What `load` takes: a name that was given, or the checkpoint's own.

    Raises:
        LeanError: there is no such type of weights.
    """
    from leanformers.recipe import check_dtype

    dtype = "auto" if given is None else given
    check_dtype(dtype)
    return dtype


def run_measure_packed(
    model: str, task: Any, *, as_json: bool, dtype: str | None, trust_remote_code: bool, **options: Any
) -> None:
    """Time one model padded, length-sorted and packed, and say what to expect."""
    from leanformers.measure import environment
    from leanformers.measure.environment import describe
    from leanformers.measure.packed import compare_packed

    silence_transformers()
    if task is None:
        raise LeanError("--packed compares on texts: give --task NAME or --data FILE")
    loaded, tokenizer = _loaded(model, task, dtype, trust_remote_code)
    found = compare_packed(loaded, task, tokenizer, **options)
    if as_json:
        record = {"model": model, "packing": found.to_json(), "environment": environment()}
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
        return
    from leanformers.cli import tables

    console().print(tables.packing(found))
    console().print(describe(), style="dim", markup=False)


def run_measure_everywhere(
    model: str,
    task: Any,
    runtimes: list[str],
    *,
    as_json: bool,
    dtype: str | None,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Measure one model in several runtimes, and say which cannot run it."""
    from leanformers.measure import environment
    from leanformers.measure.environment import describe
    from leanformers.measure.everywhere import everywhere
    from leanformers.runtimes import check

    silence_transformers()
    if task is None:
        raise LeanError("runtimes are compared on a task: give --task NAME or --data FILE")
    for name in runtimes:
        if name != "all":
            check(name)
    loaded, tokenizer = _loaded(model, task, dtype, trust_remote_code)
    found, refused = everywhere(loaded, tokenizer, task, runtimes, **options)
    if as_json:
        told = {name: measured.to_json() for name, measured in found.items()}
        record = {"model": model, "measurements": told, "refused": refused, "environment": environment()}
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
        return
    from leanformers.cli import tables

    console().print(tables.everywhere(found, refused))
    console().print(describe(), style="dim", markup=False)


def run_advise(model: str, task: Any, *, length: int, trust_remote_code: bool) -> None:
    """Print which methods suit a model, and what each is estimated to save."""
    from leanformers.advisor import advise
    from leanformers.cli import tables

    silence_transformers()
    found = advise(model, task, length=length, trust_remote_code=trust_remote_code)
    console().print(tables.advice(found, length))
