"""What a benchmark hands back: a table for people and a record for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is left-aligned, the others right-aligned.

    Attributes:
        note: what the columns mean, a sentence or two.
    """

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown, with its title as a heading."""
        lines = [f"## {self.title}", "", self.note, ""]
        lines += [_line(self.columns), _line(["---", *["---:"] * (len(self.columns) - 1)])]
        return "\n".join([*lines, *(_line(row) for row in self.rows)])


@dataclass(frozen=True)
class Result:
    """The outcome of one benchmark at one number of ranks; ``picture`` is a PNG."""

    table: Table
    record: Record
    picture: bytes | None = None


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
