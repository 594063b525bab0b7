"""The options of the commands, each once; a command names those that it takes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class TaskKind(StrEnum):
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
LAST_SEED = 2**32 - 1  # numpy takes no larger one
Model = Annotated[
    str,
    typer.Option("--model", help="A folder, [b]minilm[/b], [b]smollm2[/b], or a name on the hub.", show_default=False),
]
Task = Annotated[
    str | None,
    typer.Option(
        "--task", help="A packaged task: sentiment, docstrings-search, docstrings-lm …", rich_help_panel=_DATA
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Your own: a CSV, JSON Lines or Parquet file, a folder, or a data set on the hub.",
        rich_help_panel=_DATA,
    ),
]
Text = Annotated[str | None, typer.Option("--text", help="Column of the texts.", rich_help_panel=_DATA)]
Label = Annotated[str | None, typer.Option("--label", help="Column of the labels.", rich_help_panel=_DATA)]
Query = Annotated[str | None, typer.Option("--query", help="Column of the queries, for search.", rich_help_panel=_DATA)]
Body = Annotated[str | None, typer.Option("--body", help="Column of what they should find.", rich_help_panel=_DATA)]
Kind = Annotated[
    TaskKind | None,
    typer.Option("--kind", help="What to do with --data; told from the columns.", rich_help_panel=_DATA),
]
Validation = Annotated[
    str | None,
    typer.Option("--validation", help="Split or file to choose by; else a share of --data.", rich_help_panel=_DATA),
]
Test = Annotated[
    str | None,
    typer.Option("--test", help="Split or file to measure on; else a share of --data.", rich_help_panel=_DATA),
]
Size = Annotated[int | None, typer.Option("--size", help="Training rows to use.", min=2, rich_help_panel=_DATA)]
Length = Annotated[
    int | None, typer.Option("--max-length", help="Longest input in tokens.", min=4, rich_help_panel=_DATA)
]
Metric = Annotated[str | None, typer.Option("--metric", help="What counts as quality.", rich_help_panel=_DATA)]
DropEmpty = Annotated[
    bool, typer.Option("--drop-empty", help="Leave out rows with empty values.", rich_help_panel=_DATA)
]
Encoding = Annotated[
    str | None, typer.Option("--encoding", help="Of a text file that is not UTF-8.", rich_help_panel=_DATA)
]
Delimiter = Annotated[
    str | None, typer.Option("--delimiter", help="Of a CSV file without commas.", rich_help_panel=_DATA)
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a model from the hub.")
]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same result.", min=0, max=LAST_SEED)]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="Load the weights as float32, bfloat16 or float16; else as they are stored."),
]
Runtime = Annotated[
    list[str] | None,
    typer.Option(
        "--runtime",
        help="Where the model runs: torch, torch-compile, onnxruntime, openvino … As often as you like; all: "
        "everything here. Else torch.",
    ),
]
Goal = Annotated[
    list[str] | None,
    typer.Option(
        "--goal",
        help='As often as you like: "latency<=0.5x", "quality>=0.99x", "bytes<=20e6".',
        rich_help_panel=_SEARCH,
    ),
]
Run = Annotated[Path | None, typer.Option("--out", help="Folder of the run; the same command again goes on with it.")]
Trials = Annotated[int | None, typer.Option("--trials", help="Recipes to try.", min=1, rich_help_panel=_SEARCH)]
Finalists = Annotated[
    int | None,
    typer.Option("--finalists", help="Trainings in full, of the most promising.", min=0, rich_help_panel=_SEARCH),
]
Points = Annotated[
    int | None,
    typer.Option("--points", help="Checkpoints to keep at most.", min=1, rich_help_panel=_SEARCH),
]
Minutes = Annotated[
    float | None,
    typer.Option("--minutes", help="Time to spend in all; what fits is said at the start.", rich_help_panel=_SEARCH),
]
Method = Annotated[
    list[str] | None,
    typer.Option("--method", help="Search among these methods only (repeatable).", rich_help_panel=_SEARCH),
]
Estimate = Annotated[
    int | None,
    typer.Option("--estimate", help="Training examples of an estimate; 0: none.", min=0, rich_help_panel=_SEARCH),
]
ValidationRows = Annotated[
    int | None,
    typer.Option("--validation-rows", help="Rows that estimates are compared on.", min=1, rich_help_panel=_SEARCH),
]
TestRows = Annotated[
    int | None,
    typer.Option("--test-rows", help="Rows of the last measurement; else all.", min=1, rich_help_panel=_SEARCH),
]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", help="Rows of a timed batch.", min=1, rich_help_panel=_SEARCH)
]
Tune = Annotated[
    bool | None,
    typer.Option(
        "--tune/--no-tune",
        help="Fine-tune the model first; else only where its head is new.",
        rich_help_panel=_SEARCH,
    ),
]
Stock = Annotated[
    bool, typer.Option("--stock", help="Only models that transformers loads alone.", rich_help_panel=_SEARCH)
]
Runtimes = Annotated[
    list[str] | None,
    typer.Option(
        "--runtime",
        help="What serves it, such as openvino-int8: baseline, goals and search are of it. Beside torch, or after "
        "another: the points are measured there too. all: everything here. Else torch, then what is installed.",
        rich_help_panel=_SEARCH,
    ),
]
