"""A recipe: model, task, seed and an ordered list of methods with settings, as YAML or Python.

    leanformers: 1
    model: minilm
    task: sentiment
    seed: 0
    steps:
      - {method: fine-tune, epochs: 2}
      - {method: quantization, scheme: int8_weight_only}

Everything is checked before any work. The seed is set anew before each step, so that a recipe that goes on
from the saved model of a step gives what it gives in one go. The teacher is the model as it is after the
leading steps that prepare it for the task.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from leanformers.errors import LeanError
from leanformers.execute import (
    apart,
    attach_reference,
    check_device,
    execute,
    load_model,
    save_checkpoint,
    seed_everything,
    task_of,
    write_provenance,
)
from leanformers.folders import check_output, whole, write_json, write_text
from leanformers.methods import build, get
from leanformers.methods.subject import Subject

VERSION = 1
FILE = "recipe.yaml"
DTYPES = ("auto", "float32", "bfloat16", "float16")
_FIELDS = ("leanformers", "model", "task", "dtype", "seed", "steps")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What makes a lean model from a given one.

    model: a folder or a name; None where it is handed over loaded. task: a name or a path, or a mapping of
    `source` and the options of `leanformers.tasks.task`; None for methods that need no data. dtype: that of
    the loaded weights, "auto" being the checkpoint's own.
    """

    model: str | None = None
    task: str | Mapping[str, Any] | None = None
    dtype: str = "auto"
    seed: int = 0
    steps: tuple[Mapping[str, Any], ...] = field(default=())

    def __post_init__(self) -> None:
        check_seed(self.seed)
        object.__setattr__(self, "steps", tuple(plain_step(step) for step in self.steps))

    @property
    def key(self) -> str:
        """Hash of the whole recipe (12 hex digits)."""
        head = {"model": self.model, "task": self.task, "dtype": self.dtype, "seed": self.seed}
        return key_of([head, *self.steps])

    def check(self) -> Recipe:
        """Build every method once, so that an unknown method or setting is refused before any work."""
        for step in self.steps:
            build(step)
        return self

    def to_yaml(self) -> str:
        import yaml

        data: dict[str, Any] = {"leanformers": VERSION, "model": self.model}
        data |= {"task": self.task, "seed": self.seed}
        if self.dtype != "auto":
            data["dtype"] = self.dtype
        data["steps"] = [dict(step) for step in self.steps]
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)

    @classmethod
    def from_yaml(cls, text: str, where: str = "the recipe") -> Recipe:
        """Read and check a recipe; LeanError names what is wrong in `where`."""
        import yaml

        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f" at line {mark.line + 1}" if mark else ""
            problem = getattr(error, "problem", None) or str(error).split("\n")[0]
            raise LeanError(f"{where} is not valid YAML{line}: {problem}") from None
        if isinstance(data, list):
            data = {"steps": data}
        if not isinstance(data, dict):
            raise LeanError(f"{where} is no recipe: it holds {type(data).__name__}, not model, task, seed and steps")
        for name in data:
            if name not in _FIELDS:
                close = get_close_matches(str(name), _FIELDS, n=1)
                guess = f" (did you mean '{close[0]}'?)" if close else ""
                raise LeanError(f"{where} has an unknown field '{name}'{guess}; the fields are {', '.join(_FIELDS)}")
        return cls._from_data(data, where)

    @classmethod
    def _from_data(cls, data: Mapping[str, Any], where: str) -> Recipe:
        version = data.get("leanformers", VERSION)
        if not isinstance(version, int) or version > VERSION:
            raise LeanError(f"{where} is of version {version}, newer than {VERSION}: upgrade leanformers")
        seed, steps, task = data.get("seed", 0), data.get("steps"), data.get("task")
        if not isinstance(steps, list):
            raise LeanError(f"{where}: steps must be a list of methods with settings, not {steps!r}")
        if isinstance(task, dict) and not isinstance(task.get("source"), str):
            raise LeanError(f"{where}: a task with options needs 'source', a name or a path")
        if not isinstance(task, str | dict | None):
            raise LeanError(f"{where}: task must be a name, a path or a mapping with 'source', not {task!r}")
        model = data.get("model")
        if not isinstance(model, str | None):
            raise LeanError(f"{where}: model must be a name or a folder, not {model!r}")
        dtype = data.get("dtype", "auto")
        if dtype not in DTYPES:
            raise LeanError(f"{where}: dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        try:
            return cls(model=model, task=task, dtype=dtype, seed=seed, steps=tuple(steps)).check()
        except LeanError as error:
            raise LeanError(f"{where}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read recipe.yaml, or the one in a folder."""
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise LeanError(f"there is no recipe {file}: give a YAML file with model, task, seed and steps") from None
        except UnicodeDecodeError as error:
            raise LeanError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None
        return cls.from_yaml(text, str(file))

    def save(self, path: str | Path) -> None:
        write_text(Path(path), self.to_yaml())


def check_dtype(dtype: Any) -> None:
    """Raise a LeanError unless `dtype` is one of `DTYPES`."""
    if dtype not in DTYPES:
        raise LeanError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")


def check_seed(seed: Any) -> None:
    """Raise a LeanError unless `seed` is one that Python, numpy and torch all take."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise LeanError(f"seed must be a whole number from 0 to 2^32 - 1, not {seed!r}")


def plain_step(step: Any) -> dict[str, Any]:
    """A step as plain data: a mapping (tuples as lists), or a method's instance as its changed settings."""
    if dataclasses.is_dataclass(step) and not isinstance(step, type):
        slug = getattr(step, "slug", None)
        if slug is None:
            raise LeanError(f"{type(step).__name__} is not a registered method: decorate it with @method")
        defaults = {entry.name: entry.default for entry in get(slug).settings}
        settings = {entry.name: getattr(step, entry.name) for entry in dataclasses.fields(step)}
        step = {
            "method": slug,
            **{name: value for name, value in settings.items() if value != defaults[name]},
        }
    if not isinstance(step, Mapping) or not isinstance(step.get("method"), str):
        raise LeanError(f"a step of a recipe is a mapping with 'method' and its settings, not {step!r}")
    return {str(name): _listed(value) for name, value in step.items()}


def _listed(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_listed(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _listed(item) for name, item in value.items()}
    return value


def key_of(steps: Iterable[Mapping[str, Any]]) -> str:
    """Hash of steps (12 hex digits): equal for equal recipes, whatever the order of the settings."""
    text = json.dumps([dict(step) for step in steps], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def apply(
    steps: Recipe | str | Path | Sequence[Any],
    model: Any,
    task: Any = None,
    *,
    tokenizer: Any = None,
    seed: int | None = None,
    device: Any = None,
    progress: bool = False,
    copy_model: bool = True,
) -> Any:
    """The lean model that the steps make of `model`.

    Args:
        steps: methods with settings ({"method": slug, **settings} or instances), a Recipe, or its file.
        model: a loaded model, left as it is (copy_model=False edits it in place), a folder or a name.
        task: a Task or what `leanformers.tasks.task` takes; methods that train or calibrate need one.
        tokenizer: of a loaded model; found beside it where it is not given.
        seed: instead of the recipe's own. device: where the steps run; None where the model is.
        progress: bars for what takes long, on stderr.

    Returns:
        The model, with a changed tokenizer as its attribute `tokenizer`.

    Raises:
        LeanError: a recipe, a model or a task that cannot be used, before any work.
    """
    recipe = as_recipe(steps)
    lean, new_tokenizer, old_tokenizer = _run(
        recipe,
        model,
        task,
        tokenizer=tokenizer,
        seed=seed,
        device=device,
        progress=progress,
        copy_model=copy_model,
    )
    if new_tokenizer is not None and new_tokenizer is not old_tokenizer:
        lean.tokenizer = new_tokenizer
    return lean


def as_recipe(steps: Recipe | str | Path | Sequence[Any]) -> Recipe:
    """A recipe from any of its forms, checked."""
    if isinstance(steps, Recipe):
        return steps.check()
    if isinstance(steps, str | Path):
        return Recipe.load(steps)
    if isinstance(steps, Mapping) or not isinstance(steps, Iterable):
        steps = [steps]
    return Recipe(steps=tuple(steps)).check()  # type: ignore[arg-type]


def run(
    recipe: Recipe | str | Path | Sequence[Any],
    model: Any = None,
    task: Any = None,
    *,
    out: str | Path | None = None,
    tokenizer: Any = None,
    seed: int | None = None,
    device: Any = None,
    progress: bool = False,
    measured: bool = True,
) -> tuple[Any, Any]:
    """Run a recipe; with `out`, write the model there, its measurement, recipe and environment beside it.

    model and task stand in for the recipe's own. A training that was cut off goes on when called again with
    the same `out`. Returns (model, tokenizer).

    Raises:
        LeanError: unknown method or setting, no model, an `out` that holds something else, a full disk.
    """
    recipe = as_recipe(recipe)
    if out is None:
        lean, new_tokenizer, _ = _run(
            recipe, model, task, tokenizer=tokenizer, seed=seed, device=device, progress=progress
        )
        return lean, new_tokenizer
    target = Path(out)
    check_output(target, lambda folder: (folder / FILE).is_file(), "a model that leanformers wrote")
    with whole(target, keep=True) as partial:
        done = partial / FILE
        if done.is_file() and Recipe.load(done) != recipe:
            shutil.rmtree(partial / "training", ignore_errors=True)
        recipe.save(done)
        lean, new_tokenizer, _ = _run(
            recipe,
            model,
            task,
            tokenizer=tokenizer,
            seed=seed,
            device=device,
            progress=progress,
            folder=partial / "training",
        )
        the_task = task_of(recipe.task if task is None else task)
        save_checkpoint(partial, lean, new_tokenizer, the_task)
        write_provenance(partial, named(recipe, model, task, seed))
        if measured:
            from leanformers.measure import measure

            found = measure(lean, the_task, new_tokenizer, folder=partial)
            write_json(partial / "measurement.json", found.to_json())
        shutil.rmtree(partial / "training", ignore_errors=True)
    return lean, new_tokenizer


def _run(
    recipe: Recipe,
    model: Any,
    task: Any,
    *,
    tokenizer: Any = None,
    seed: int | None = None,
    device: Any = None,
    progress: bool = False,
    copy_model: bool = True,
    folder: Path | None = None,
) -> tuple[Any, Any, Any]:
    """(lean model, its tokenizer, the tokenizer before)."""
    seed = recipe.seed if seed is None else seed
    check_seed(seed)
    check_device(device)
    the_task = task_of(recipe.task if task is None else task)
    source = recipe.model if model is None else model
    if source is None:
        raise LeanError("the recipe names no model: add the field 'model', or give one (model=, --model)")
    seed_everything(seed)  # a new head starts from random numbers
    loaded, old_tokenizer = load_model(source, the_task, tokenizer, recipe.dtype)
    if copy_model:
        loaded = apart(loaded, source)
    if device is not None:
        loaded = loaded.to(device)
    attach_reference(the_task, loaded, old_tokenizer)
    subject = Subject(model=loaded, tokenizer=old_tokenizer, task=the_task, device=device, seed=seed, progress=progress)
    execute(recipe.steps, subject, folder=folder)
    return subject.model, subject.tokenizer, old_tokenizer


def spec_of(task: Any) -> str | dict[str, Any] | None:
    """What a recipe writes of a task, so that it can be made again."""
    if task is None or isinstance(task, str):
        return task
    if isinstance(task, Path):
        return str(task)
    if isinstance(task, Mapping):
        return dict(task)
    options = dict(getattr(task, "options", None) or {})
    source = str(getattr(task, "source", None) or task.name)
    return {"source": source, **options} if options else source


def name_of(model: Any) -> str:
    """What a recipe writes of a model: its folder or name."""
    if isinstance(model, tuple):
        model = model[0]
    if isinstance(model, str | Path):
        return str(model)
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def named(recipe: Recipe, model: Any, task: Any, seed: int | None) -> Recipe:
    """The recipe with the model, task and seed that were really used."""
    return Recipe(
        model=recipe.model if model is None else name_of(model),
        task=recipe.task if task is None else spec_of(task),
        dtype=recipe.dtype,
        seed=recipe.seed if seed is None else seed,
        steps=recipe.steps,
    )
