"""The end of every command: lines and tables for a person, figures for `--json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.errors import printable

MOST_LINES = 50  # lines or rows of one kind; figures have all of them


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The result of a command.

    parts: lines and tables, in the order in which they are printed.
    figures: the same facts and more, as JSON.
    """

    parts: Sequence[str | Table]
    figures: Mapping[str, Any]


def text_table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> Table:
    """Build a table without a frame. Cells are plain text: no markup, no highlighting."""
    table = Table(*header, box=None, pad_edge=False, show_header=bool(header), header_style="")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def first_lines(lines: Sequence[str], rest: str = "--json writes all of them") -> list[str]:
    """Return the first lines, and a line that counts the others."""
    if len(lines) <= MOST_LINES:
        return list(lines)
    return [*lines[:MOST_LINES], f"… and {len(lines) - MOST_LINES} more; {rest}"]


def show_summary(console: Console, summary: Summary, json_path: Path | None = None) -> None:
    """Print the summary, and write its figures to `json_path` if that is given.

    The file is ASCII, because names of files may be no valid text.
    """
    for part in summary.parts:
        if isinstance(part, str):
            console.print(printable(part), markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(part, highlight=False)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(summary.figures, indent=2)
        json_path.write_text(text + "\n", encoding="ascii")
