"""The end of a command: what is printed, and what --json writes."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from pipeline.reports.command_summary import (
    MOST_LINES,
    Summary,
    first_lines,
    show_summary,
    text_table,
)


def printed(summary: Summary, json_path: Path | None = None) -> str:
    out = io.StringIO()
    show_summary(Console(file=out, width=80), summary, json_path)
    return out.getvalue()


def test_lines_and_cells_are_plain_text() -> None:
    name = "[bold]a [/x] song[/bold].wav"
    table = text_table([(name, "[red]")], ("song", "reason"))
    output = printed(Summary(parts=[name, table], figures={}))
    lines = [line.rstrip() for line in output.splitlines()]
    assert lines == [name, f"{'song':30}reason", f"{name:30}[red]"]


def test_a_long_line_is_not_wrapped() -> None:
    path = "/" + "a/" * 100
    assert printed(Summary(parts=[path], figures={})) == path + "\n"


def test_json_has_the_figures_as_ascii(tmp_path: Path) -> None:
    figures = {"song": "caf\u00e9\udcff.wav", "clips": 3, "reason": None}
    path = tmp_path / "new" / "figures.json"
    printed(Summary(parts=[], figures=figures), path)
    assert json.loads(path.read_bytes().decode("ascii")) == figures


def test_many_lines_are_counted() -> None:
    lines = [str(i) for i in range(MOST_LINES + 3)]
    assert first_lines(lines[:MOST_LINES]) == lines[:MOST_LINES]
    assert first_lines(lines) == [*lines[:MOST_LINES], "… and 3 more; --json writes all of them"]
