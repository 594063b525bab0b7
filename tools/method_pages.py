"""Writes one page per registered method into docs/methods/: its docstrings, needs, settings and evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evidence_table
from leanformers import evidence
from leanformers.cli import describe as words

FOLDER = evidence_table.ROOT / "docs" / "methods"


def page(info: Any, result: dict[str, Any] | None) -> str:
    """The page of one method."""
    parts = [f"# {info.slug}", f"**{escaped(info.title)}.**"]
    if info.paper:
        parts.append(f"*{escaped(info.paper)}*")
    for doc in (words.documentation(info), words.own_doc(info)):
        if doc:
            parts.append(markdown(doc))
    stage = words.STAGE_TITLES.get(info.stage, info.stage)
    facts = {"stage": stage, "needs": words.needs(info), "suits": words.suits(info), "runs in": words.runs_in(info)}
    parts.append("\n".join(f"- {name}: {told}" for name, told in facts.items()))
    parts.append("## Settings")
    rows = words.settings_rows(info)
    if rows:
        lines = ["| setting | type | default | a search tries | |", "| --- | --- | --- | --- | --- |"]
        for name, kind, default, searched, told in rows:
            cells = [f"`{name}`", kind, f"`{default}`" if default else "", searched, told]
            lines.append("| " + " | ".join(evidence_table.cell(cell) for cell in cells) + " |")
        parts.append("\n".join(lines))
    else:
        parts.append("It has none.")
    step = f"steps:\n  - {{method: {info.slug}}}"
    parts.append(f"## In a recipe\n\n```yaml\n{step}\n```")
    parts.append("## Evidence")
    if result is None:
        parts.append("None has been recorded yet.")
    else:
        parts += [evidence_table.text(result["claim"]) + ".", evidence_table.check_table(result)]
        if result.get("cause"):
            parts.append(f"Thought to be the cause: {evidence_table.text(result['cause'])}.")
        parts.append(evidence_table.facts(result))
    return "\n\n".join(parts) + "\n"


def index(infos: dict[str, Any], results: dict[str, Any]) -> str:
    """The list of all methods."""
    lines = ["# Methods", "", "| method | what it does | needs | evidence |", "| --- | --- | --- | --- |"]
    for slug, info in infos.items():
        held = evidence.verdict(results[slug]) if slug in results else "–"
        lines.append(f"| [{slug}]({slug}.md) | {evidence_table.cell(info.title)} | {words.needs(info)} | {held} |")
    return "\n".join(lines) + "\n"


def markdown(doc: str) -> str:
    """A docstring as Markdown: its double backquotes become single ones, its literal blocks become code."""
    lines: list[str] = []
    for line in doc.replace("``", "`").splitlines():
        if line.rstrip().endswith("::"):
            line = line.rstrip()[:-1]
        lines.append(escaped(line) if not line.startswith("    ") else line)
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text without what Markdown would take as HTML."""
    return text.replace("<", "&lt;")


def write(folder: Path = FOLDER) -> list[Path]:
    """Write all pages, the index first; those of methods that are gone go, unchanged ones stay."""
    from leanformers.methods import methods

    infos, results = methods(), evidence.results()
    texts = {"index": index(infos, results)} | {slug: page(info, results.get(slug)) for slug, info in infos.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.stem not in texts:
            path.unlink()
    for name, text in texts.items():
        path = folder / f"{name}.md"
        if not path.is_file() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
    return [folder / f"{name}.md" for name in texts]


if __name__ == "__main__":
    print(f"{len(write())} pages in {FOLDER.relative_to(evidence_table.ROOT)}")
