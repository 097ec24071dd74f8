"""Tables on the terminal, and the files that a run leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.result import Record, Result, Table


def show(table: Table, console: Console) -> None:
    """Prints a table."""
    grid = RichTable(title=table.title, caption=table.note, title_justify="left", caption_justify="left")
    for number, column in enumerate(table.columns):
        grid.add_column(column, justify="right" if number else "left", no_wrap=not number)
    for row in table.rows:
        grid.add_row(*row)
    console.print(grid)


def write(folder: Path, stem: str, head: Record, results: Sequence[Result]) -> tuple[Path, ...]:
    """Writes ``stem.md``, ``stem.json`` and pictures with their benchmarks' names, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, data = folder / f"{stem}.md", folder / f"{stem}.json"
    markdown.write_text(render(head, results))
    records = [result.record for result in results if result.record]
    data.write_text(json.dumps({**head, "results": records}, indent=1) + "\n")
    pictures = [(folder / _picture(result), result.picture) for result in results if result.picture is not None]
    for path, content in pictures:
        path.write_bytes(content)
    return markdown, data, *(path for path, _ in pictures)


def render(head: Record, results: Sequence[Result]) -> str:
    """The Markdown file: what it was measured on, and the tables."""
    machine, load = head["machine"], head["load"]
    lines = [
        "# Benchmarks",
        "",
        f"{head['date']}; {machine['cpu']}, {machine['cores']} core(s), {machine['memory_gib']} GiB; "
        f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}; "
        f"load {load['before']} before, {load['after']} after.",
    ]
    for result in results:
        lines += ["", result.table.markdown()]
        if result.picture is not None:
            lines += ["", f"![{result.table.title}]({_picture(result)})"]
    return "\n".join(lines) + "\n"


def _picture(result: Result) -> str:
    return f"{result.record['benchmark']}.png"
