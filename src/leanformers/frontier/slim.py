"""`slim`: a whole search, from a model and goals to the frontier on disk."""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from leanformers import folders
from leanformers.errors import LeanError
from leanformers.execute import check_device, task_of
from leanformers.frontier.baseline import BASELINE
from leanformers.frontier.bench import Workbench, check_steps
from leanformers.frontier.clock import LAST, Clock
from leanformers.frontier.conclude import beside, points_of, reference_points, source_points, write, write_points
from leanformers.frontier.deployed import not_exported
from leanformers.frontier.goals import Goal, objectives, parse_all, relative
from leanformers.frontier.result import FILE, Frontier
from leanformers.frontier.search import Effort, Search
from leanformers.frontier.shelf import settled
from leanformers.frontier.space import Space
from leanformers.frontier.venue import Venue
from leanformers.methods import Budget, MethodInfo, Subject, get, methods
from leanformers.recipe import Recipe, check_dtype, name_of, spec_of

RUN = "run.json"
_VERSION = 1
_log = logging.getLogger(__name__)


def slim(
    model: Any,
    task: Any,
    goals: str | Iterable[str] = (),
    out: str | Path | None = None,
    *,
    trials: int = 20,
    finalists: int = 3,
    points: int = 8,
    minutes: float | None = None,
    seed: int = 0,
    methods: Sequence[str] | None = None,
    tokenizer: Any = None,
    tune: bool | str | Mapping[str, Any] = "auto",
    estimate: Budget | int = 384,
    validation: int | None = 512,
    test: int | None = None,
    batch_size: int = 16,
    runtime: str | Sequence[str] = "auto",
    dtype: str = "auto",
    device: Any = None,
    stock: bool = False,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> Frontier:
    """Search for recipes that make the model cheaper at little loss, and keep those that no other beats.

    The model as it is (fine-tuned first where its head is new) is the baseline and the teacher. Each trial
    is a recipe whose training is cut to `estimate` examples; the most promising are trained in full and
    measured beside the baseline on the test rows. The same call with the same `out` goes on where it was
    stopped.

    Args:
        model: a loaded model, a folder or a name.
        task: a Task, or what `leanformers.tasks.task` takes.
        goals: such as "latency<=0.5x", "quality>=0.99x", "bytes<=120MB"; their costs are what is traded against
            quality (latency and bytes without any).
        out: the run's folder; by default runs/<model>-<task>.
        trials: recipes to estimate. finalists: trainings in full. points: checkpoints to keep at most.
        minutes: wall-clock limit of this call, in all: the baseline's training, the rows that are measured and the
            exports are cut to what fits, which is said; the step under way is ended.
        seed: of everything that is drawn. methods: search among these alone.
        tune: "auto" fine-tunes a model whose head is new; True always, False never, or settings of fine-tune.
        estimate: training examples of an estimate (0: none), or a Budget. validation: rows that estimates are
            compared on. test: rows of the last measurement, None for all.
        batch_size: of the timing. runtime: names of `leanformers.runtimes`. The first that runs in this process
            (torch, torch-compile …) is where the search measures; where all named run exported folders, the first of
            them is: baseline, estimates and points are then measured as they are served, and ratios and goals are to
            the unslimmed model there. The points are measured in the others in the end. "auto": torch, and in the end
            what else is installed that needs no compiler; "all": torch, and everything here.
        dtype: of the weights as loaded, "auto" being the checkpoint's own.
        device: None takes CUDA where there is one. stock: keep to models that transformers loads alone.
        progress: say on stderr what happens.

    Raises:
        LeanError: bad input, before any training; a full disk.
        KeyboardInterrupt: Ctrl-C before there is a baseline; later it ends the search with what there is.
    """
    from leanformers.deploy import quantises, width_multiple

    start = time.monotonic()
    clock = Clock()
    the_task = task_of(task)
    if the_task is None:
        raise LeanError("a search needs a task: give a packaged name such as 'sentiment', or your own data")
    wanted = parse_all(goals, the_task.better)
    effort = _effort(trials, finalists, points, minutes)
    clock.minutes = effort.minutes
    budget = estimate if isinstance(estimate, Budget) else Budget(examples=_count("estimate", estimate, 0))
    steps = check_steps(tune)
    check_dtype(dtype)
    check_device(device)
    infos = _chosen(methods)
    first, others = runtimes_of(runtime, the_task)
    recipe = Recipe(model=name_of(model), task=spec_of(task), dtype=dtype, seed=seed)
    folder = Path(out) if out is not None else Path("runs") / _default_name(recipe, the_task)
    say = _teller(progress)
    with folders.guarding_disk(folder), ExitStack() as stack:
        created = _open_run(folder, recipe, the_task, steps, model, first)
        bench = Workbench(
            folder,
            model,
            the_task,
            infos,
            recipe=recipe,
            tokenizer=tokenizer,
            tune=steps,
            budget=budget,
            validation=validation,
            test=test,
            batch_size=batch_size,
            runtime=first,
            runtimes=others,
            device=device if device is not None else _device(),
            progress=progress,
            trust_remote_code=trust_remote_code,
            clock=clock,
            say=say,
        )
        fit = partial(suited, infos, venue=bench.venue, explicit=methods is not None, stock=stock)
        bench.check = fit
        if not (folder / BASELINE / "measurement.json").is_file():
            where = f", exported for {first}" if bench.venue.exports else ""
            say(f"baseline: the model as it is, fine-tuned where its head is new{where}")
        baseline = bench.baseline()
        stack.enter_context(settled())
        sources = source_points(folder, bench.recipe, baseline)
        told = f"{the_task.metric} {baseline.quality:.4g}"
        told += "".join(f" in {first}, {p.measurement.quality:.4g} in torch" for p in sources if p.measurement)
        say(f"baseline: {told}, {baseline.parameters:,} parameters")
        late = clock.up(0.5)  # a reference is worth no time that the search needs
        references = [] if late else reference_points(folder, the_task, baseline, test, seed)
        references = [*references, *sources]
        chosen, skipped = fit(bench.subject)
        multiple, quantised = width_multiple([first, *others]), quantises(first)
        space = Space(list(chosen.values()), multiple=multiple, quantised=quantised)
        asked = [relative(goal, baseline.quality, the_task.better) for goal in wanted]
        floors = [goal.value for goal in asked if goal.metric == "quality" and goal.relative]
        bench.quality_goal = max(floors, default=None)
        search = Search(folder, bench, space, asked, objectives(asked), effort, seed=seed, say=say)
        search.clock, search.last = clock, LAST * (2 if others else 1)
        status = "complete"
        try:
            search.explore()
            search.confirm()
        except KeyboardInterrupt:
            status = "interrupted"
            say("interrupted: measuring what there is (Ctrl-C again to leave that out)")
        return _conclude(search, bench, wanted, baseline, references, skipped, status, created, start)


def _conclude(
    search: Search,
    bench: Workbench,
    goals: Sequence[Goal],
    baseline: Any,
    references: Sequence[Any],
    skipped: Mapping[str, str],
    status: str,
    created: str,
    start: float,
) -> Frontier:
    """Measure, write and describe what there is."""
    from leanformers.measure import environment

    bench.close()
    folder = search.folder
    task = bench.task.describe() if hasattr(bench.task, "describe") else {"name": bench.task.name}
    task = {"name": bench.task.name, "kind": bench.task.kind, "better": bench.task.better, **task}
    with FileLock(folder / "locks" / "conclude.lock"):
        first, tried = points_of(search, bench, bench.recipe, baseline)
        winners = write_points(folder, [point for point in tried if point.status == "frontier"], task, tried)
        before = json.loads((folder / FILE).read_text()) if (folder / FILE).is_file() else {}
        frontier = Frontier(
            folder=folder,
            model=str(bench.recipe.model),
            task=task,
            goals=tuple(goals),
            objectives=search.objectives,
            baseline=first,
            references=tuple(beside(point, first) for point in references),
            points=tuple(winners),
            trials=tuple(point for point in tried if point.status != "frontier"),
            skipped={**skipped, **not_exported(folder), **bench.left_out},
            status=status,
            seed=bench.recipe.seed,
            seconds=time.monotonic() - start + float(before.get("seconds") or 0.0),
            created=created,
            environment=environment(),
            runtime=bench.venue.runtime,
        )
        write(frontier)
    return frontier


def _open_run(folder: Path, recipe: Recipe, task: Any, tune: Any, model: Any, runtime: str) -> str:
    """Make the run folder or go on in it; returns when it was made (ISO 8601).

    Raises:
        LeanError: the folder holds something else, or the search of another model, task or seed, or in another runtime.
    """
    folders.check_output(folder, _is_run, "a run of leanformers slim")
    ours = {
        "leanformers": _VERSION,
        "model": recipe.model,
        "task": task.fingerprint,
        "seed": recipe.seed,
        "dtype": recipe.dtype,
        "tune": tune,
        "weights": _weights(model),
        "runtime": runtime,
    }
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "locks" / "run.lock"):
        theirs = json.loads((folder / RUN).read_text()) if (folder / RUN).is_file() else None
        if theirs is None or (not ours.items() <= theirs.items() and _not_begun(folder)):
            folders.write_json(folder / RUN, {**ours, "task_name": task.name, "created": now})
            return now
    theirs.setdefault("runtime", _runtime_of(folder) or runtime)
    for name, value in ours.items():
        if name == "runtime" and theirs[name] != value:
            raise LeanError(
                f"{folder} holds a search that measures in {theirs[name]}, not in {value}: go on with --runtime "
                f"{theirs[name]} (other runtimes may follow it), or choose another --out"
            )
        if theirs.get(name) != value:
            shown = (theirs.get("task_name"), task.name) if name == "task" else (theirs.get(name), value)
            other = "with other data or settings" if shown[0] == shown[1] else f"{shown[0]!r}, not {shown[1]!r}"
            raise LeanError(f"{folder} holds a search whose {name} is {other}: choose another --out")
    return str(theirs["created"])


def _runtime_of(folder: Path) -> str | None:
    """Where a run measures that was made before runs wrote it down; None while it has measured nothing."""
    path = folder / BASELINE / "measurement.json"
    return json.loads(path.read_text()).get("runtime") if path.is_file() else None


def _weights(model: Any) -> str | None:
    """What tells a loaded model from another of its name."""
    if isinstance(model, str | Path):
        return None
    from leanformers.surgery import content_hash

    return content_hash(model[0] if isinstance(model, tuple) else model)


def _not_begun(folder: Path) -> bool:
    """Whether nothing was made there yet, as after a slip in the model's name, and nobody is about to."""
    if any(not entry.name.startswith(".draft") and entry.name not in (RUN, "locks") for entry in folder.iterdir()):
        return False
    try:
        with FileLock(folder / "locks" / "baseline.lock").acquire(timeout=0):
            return True
    except Timeout:
        return False


def _is_run(folder: Path) -> bool:
    """A run's folder, or one whose making was cut off before run.json."""
    return (folder / RUN).is_file() or {entry.name for entry in folder.iterdir()} <= {"locks"}


def _chosen(names: Sequence[str] | None) -> dict[str, MethodInfo]:
    """The methods to search among; LeanError for an unknown one."""
    if names is None:
        return methods()
    names = [names] if isinstance(names, str) else list(names)
    found = {name: get(name) for name in names}
    return {**{slug: info for slug, info in methods().items() if info.stage == "prepare"}, **found}


def suited(
    infos: Mapping[str, MethodInfo], subject: Subject, venue: Venue, *, explicit: bool, stock: bool = False
) -> tuple[dict[str, MethodInfo], dict[str, str]]:
    """Methods that suit the baseline, its task and where it runs, and why the others do not.

    Raises:
        LeanError: one that was asked for by name does not suit, or none does.
    """
    from leanformers.anatomy import Anatomy
    from leanformers.surgery.edit import lost_by_export

    anatomy = Anatomy.of(subject.model)
    found, skipped = {}, {}
    for slug, info in infos.items():
        reason = info.missing(subject) or info.unsuitable(anatomy, subject.task)
        if reason is None and venue.exports and (lost := lost_by_export(info.edits)):
            reason = f"method '{slug}' does not suit {venue.runtime}: {lost}"
        if reason is None and stock and not info.stock:
            reason = f"method '{slug}' leaves a model that transformers cannot load alone, and --stock asks for one"
        if reason is None and not explicit and info.stage != "prepare" and not info.starts():
            reason = f"method '{slug}' offers a search nothing to start with; name it to have it tried"
        if reason is None:
            found[slug] = info
        elif explicit and info.stage != "prepare":
            raise LeanError(reason)
        else:
            skipped[slug] = reason
    if not any(info.stage != "prepare" for info in found.values()):
        raise LeanError("no method suits this model and task: " + "; ".join(skipped.values()))
    return found, skipped


def _effort(trials: int, finalists: int, points: int, minutes: float | None) -> Effort:
    if minutes is not None and not minutes > 0:
        raise LeanError(f"minutes must be above 0, not {minutes!r}")
    return Effort(
        trials=_count("trials", trials, 1),
        finalists=_count("finalists", finalists, 0),
        points=_count("points", points, 1),
        minutes=minutes,
    )


def _count(name: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise LeanError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return value


def runtimes_of(wanted: str | Sequence[str], task: Any) -> tuple[str, list[str]]:
    """What `runtime=` means for a task: where the search itself measures, and where its points are tried besides.

    The first name that runs in this process, or, where there is none, the first.

    Raises:
        LeanError: an unknown runtime, or one that is not installed.
    """
    from leanformers.deploy import DEPLOYED
    from leanformers.runtimes import available, check

    if wanted in ("auto", "all"):
        here = [name for name in available() if name in DEPLOYED and (wanted == "all" or name != "torch-aot")]
        return "torch", [name for name in here if name.startswith("llama.cpp") <= (task.kind == "causal-lm")]
    names = list(dict.fromkeys([wanted] if isinstance(wanted, str) else wanted))
    if not names:
        raise LeanError("there is no runtime to measure in: name one, such as torch")
    for name in names:
        check(name)
    first = next((name for name in names if name not in DEPLOYED), names[0])
    return first, [name for name in names if name in DEPLOYED and name != first]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _default_name(recipe: Recipe, task: Any) -> str:
    text = f"{Path(str(recipe.model)).name}-{task.name}"
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in text).strip("-.") or "run"


def _teller(progress: bool) -> Callable[[str], None]:
    """Where the course of the search is told: stderr, or the log."""
    if not progress:
        return _log.info
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    return lambda text: console.print(text, markup=False)
