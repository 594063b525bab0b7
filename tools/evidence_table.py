"""Writes the evidence tables of README.md, docs/evidence.md and docs/deploy.md from evidence/results/*.json.

python tools/evidence_table.py [--check]      --check: write nothing, exit 1 where a table is old
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import exports_table
from leanformers import evidence

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- evidence: made by `make evidence-table`, do not edit -->"
END = "<!-- end of evidence -->"
Results = Mapping[str, Mapping[str, Any]]


def short_table(results: Results) -> str:
    """One line per method, for the README."""
    lines = ["| evidence | claim | held? | strictest check |", "| --- | --- | --- | --- |"]
    for slug, result in results.items():
        failing = [check for check in result["checks"] if not check["holds"]]
        check = (failing or result["checks"])[0]
        told = f"{check['name']}: {evidence.number(check['measured'])} (required {check['required']})"
        lines.append(f"| {slug} | {cell(result['claim'])} | {evidence.verdict(dict(result))} | {cell(told)} |")
    return "\n".join(lines) if results else "No evidence has been recorded yet."


def long_table(results: Results) -> str:
    """Every check of every method, for the docs."""
    parts = []
    for slug, result in results.items():
        parts.append(f"## {slug}\n\n{text(result['claim'])}\n\nSource: {text(result['paper'])}.\n")
        parts.append(check_table(result) + "\n")
        if result.get("cause"):
            parts.append(f"Thought to be the cause: {text(result['cause'])}\n")
        parts.append(facts(result) + "\n")
    return "\n".join(parts).rstrip() if parts else "No evidence has been recorded yet."


def check_table(result: Mapping[str, Any]) -> str:
    """The checks of one method."""
    lines = ["| check | required | measured | holds |", "| --- | --- | --- | --- |"]
    for check in result["checks"]:
        measured, holds = cell(evidence.number(check["measured"])), "yes" if check["holds"] else "**no**"
        lines.append(f"| {cell(check['name'])} | {cell(str(check['required']))} | {measured} | {holds} |")
    return "\n".join(lines)


def facts(result: Mapping[str, Any]) -> str:
    """Where and how long it ran."""
    hardware, versions = result["hardware"], result["versions"]
    where = hardware.get("cpu", "?")
    if hardware.get("gpus"):
        where += " with " + ", ".join(hardware["gpus"])
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
    seeds = ", ".join(map(str, result["seeds"]))
    return f"Run on {text(str(where))}, {used}; seeds {seeds}; {result['seconds']:.0f} s."


def text(value: str) -> str:
    """A text on one line, without what Markdown would take as HTML."""
    return " ".join(str(value).split()).replace("<", "&lt;").rstrip(".")


def cell(value: str) -> str:
    """A text that may stand in a table."""
    return text(value).replace("|", "\\|")


def replaced(page: str, table: str) -> str:
    """The page with what stands between its markers replaced."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"the page must hold the markers {BEGIN} and {END} once each")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Each page with the tables, as the result files want it."""
    place = root / "evidence" / "results"
    results = evidence.results(place)
    deploy = root / "docs" / "deploy.md"
    return {
        deploy: replaced(deploy.read_text("utf-8"), exports_table.table(evidence.exports(place))),
        root / "README.md": replaced((root / "README.md").read_text("utf-8"), short_table(results)),
        root / "docs" / "evidence.md": replaced(
            (root / "docs" / "evidence.md").read_text("utf-8"), long_table(results)
        ),
    }


def main() -> int:
    stale = {path: page for path, page in pages().items() if path.read_text("utf-8") != page}
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(
                f"{path.relative_to(ROOT)} is not what evidence/results says: run make evidence-table",
                file=sys.stderr,
            )
        return 1 if stale else 0
    for path, page in stale.items():
        path.write_text(page, "utf-8")
        print(f"{path.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
