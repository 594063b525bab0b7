"""Tables on the terminal: the frontier's points and a model's measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from leanformers.report import view
from leanformers.report.quantities import QUANTITIES, TABLE, metric_title, ratio, written
from leanformers.report.zeros import zeros


def _table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="dim", show_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def _cell(point: Mapping[str, Any], key: str) -> Text:
    """Value over ratio, so that the table fits a narrow terminal."""
    value, share = written(key, point)
    return Text.assemble(value, ("\n" + share if share else "", "dim"))


def frontier(data: Mapping[str, Any]) -> Group:
    """The non-dominated points, then the baseline and the references, each with its ratios."""
    titles = [metric_title(data.get("task", {})) if key == "quality" else QUANTITIES[key].title for key in TABLE]
    titles = ["bytes" if title == "bytes on disk" else title for title in titles]
    table = _table("point", *titles, "loads with", numbers=titles)
    table.columns[-1].no_wrap = True  # a runtime's name is typed
    marks = view.letters(data)
    winners = [point for point in data.get("points", ()) if point.get("status") == "frontier"]
    legend = Table.grid(padding=(0, 1))
    for point in winners:
        letter = Text(marks[str(point["name"])], "bold green" if point["name"] == data.get("best") else "bold")
        table.add_row(letter, *(_cell(point, key) for key in TABLE), view.loads_with(point) or "–")
        where = point.get("folder") or point["name"]
        told = f"\n{found}" if (found := zeros(view.steps(point))) else ""
        legend.add_row(letter, Text.assemble(view.added(data, point), (f"\n{where}", "dim"), (told, "yellow")))
    table.add_section()
    for point in [data["baseline"], *data.get("references", ())]:
        table.add_row(str(point["name"]), *(_cell(point, key) for key in TABLE), view.loads_with(point) or "–")
    return Group(Text(), table, Text(), legend, Text(), Text(view.headline(data), "dim"))


def measurement(found: Any, baseline: Any = None, name: str = "", baseline_name: str = "") -> Table:
    """All that was measured of a model, beside another's and with the ratios to it if there is one."""
    ratios = found.ratios(baseline) if baseline is not None else {}
    lines: list[tuple[str, str, str, str, str]] = []  # title, baseline's, own, ratio, unit
    for key, quantity in QUANTITIES.items():
        title = metric_title({"metric": found.metric}) if key == "quality" else quantity.title
        lines.append((title, *_pair(found, baseline, key, quantity.write), _ratio(ratios, key), quantity.unit))
        if key == "latency":
            pair = _pair(found, baseline, "latency_p95", quantity.write)
            lines.append(("latency, 95 of 100 below", *pair, _ratio(ratios, "latency_p95"), quantity.unit))
    for metric, value in found.metrics.items():
        if metric != found.metric and isinstance(value, int | float):
            other = baseline.metrics.get(metric) if baseline is not None else None
            shown = "–" if other is None else f"{other:.4g}"
            lines.append((metric.replace("_", " "), shown, f"{value:.4g}", "", ""))
    columns = ("", baseline_name, name, "ratio", "")
    kept = range(4) if baseline is not None else (0, 2, 4)  # units would not fit beside two models
    table = _table(*(columns[i] for i in kept), numbers=[baseline_name, name, "ratio"])
    for line in lines:
        if line[2] != "–":
            cells = [Text(line[i], "dim" if i == 4 else "") for i in kept]
            table.add_row(*cells)
    return table


def everywhere(found: Mapping[str, Any], refused: Mapping[str, str]) -> Group:
    """One model by runtime, with the ratio of its latency to the first's, and why others do not run it."""
    metric = metric_title({"metric": next(iter(found.values())).metric}) if found else "quality"
    columns = ("runtime", metric, "latency", "ratio", "throughput")
    table = _table(*columns, numbers=columns[1:])
    first = next(iter(found.values()), None)
    for name, measured in found.items():
        cells = [_pair(measured, None, key, QUANTITIES[key].write)[1] for key in ("quality", "latency", "throughput")]
        table.add_row(name, *cells[:2], _ratio(measured.ratios(first), "latency"), cells[2])
    notes = [Text("\n" + "\n".join(f"{name}: {reason}" for name, reason in refused.items()))] if refused else []
    return Group(table, *notes)


def packing(found: Any) -> Group:
    """A model padded, length-sorted and packed, and what to expect."""
    columns = ("", "ms per batch", "ratio", "real tokens")
    table = _table(*columns, numbers=columns[1:])
    sorted_ratio = found.over_padded / found.over_sorted
    for name, seconds, share, real in (
        ("padded", found.padded, 1.0, found.real),
        ("padded, sorted by length", found.sorted, sorted_ratio, found.sorted_real),
        ("packed", found.packed, found.over_padded, 1.0),
    ):
        table.add_row(name, f"{1000 * seconds:.2f}", ratio(share), f"{real:.0%}")
    notes = (
        f"\n{found.rows} rows in batches of {found.batch_size}, as they stand in the data; by FLOPs alone packed would "
        f"take {found.predicted:.2f}x. Outputs differ by at most {found.difference:.1e}, the largest being "
        f"{found.scale:.1f}."
    )
    return Group(table, Text(notes, "dim"), Text("\n" + found.advice()))


def _pair(found: Any, baseline: Any, key: str, write: Callable[[float], str]) -> tuple[str, str]:
    """The baseline's value and the model's own, as texts."""
    values = (getattr(baseline, key, None), getattr(found, key, None))
    before, own = ("–" if value is None else write(value) for value in values)
    return before, own


def _ratio(ratios: Mapping[str, float], key: str) -> str:
    return ratio(ratios[key]) if key in ratios else "–"


def advice(found: Sequence[Any], length: int) -> Group:
    """What each method is estimated to save, then those that do not suit and why."""
    from leanformers.methods import NEEDS

    table = _table("method", "parameters", "bytes", "FLOPs", "needs", numbers=["parameters", "bytes", "FLOPs"])
    for entry in found:
        if not entry.suits:
            continue
        settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in entry.settings.items())
        name = Text.assemble((entry.method, "bold"), (f"\n{settings}" if settings else "", "dim"))
        cells = [_estimate(entry, key) for key in ("parameters", "bytes", "flops")]
        table.add_row(name, *cells, Text(", ".join(NEEDS.get(need, need) for need in entry.needs), "dim"))
    refused = [f"{entry.method}: {entry.reason}" for entry in found if not entry.suits]
    notes = [
        Text(
            f"\nEstimated from sizes alone; FLOPs of one sequence of {length} tokens. "
            "A dash: it cannot be known before, or there is nothing to save. "
            "Quality and speed are not estimated: leanformers slim measures both.",
            "dim",
        )
    ]
    if refused:
        notes.append(Text("\nDoes not suit\n" + "\n".join(f"  {line}" for line in refused)))
    return Group(table, *notes)


def _estimate(entry: Any, key: str) -> Text:
    """A total after the method, over its ratio to the model as it is."""
    value, share = getattr(entry, key), entry.ratios.get(key)
    if value is None:
        return Text("–")
    return Text.assemble(QUANTITIES[key].write(value), ("\n" + ratio(share) if share is not None else "", "dim"))


def by_stage(stages: Mapping[str, Sequence[tuple[str, str, str, str]]]) -> Table:
    """Methods under the titles of their stages: name, what it does over what it needs and suits, evidence."""
    table = _table("method", "what it does", "evidence")
    for column in (table.columns[0], table.columns[2]):
        column.no_wrap = True
    for title, lines in stages.items():
        table.add_row("", Text(title, "italic"), "")
        for name, told, more, held in lines:
            table.add_row(Text(name, "bold"), Text.assemble(told, ("\n" + more, "dim")), held)
        table.add_section()
    return table


def rows(columns: Sequence[str], lines: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> Table:
    """A plain table of texts."""
    table = _table(*columns, numbers=numbers)
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    return table
