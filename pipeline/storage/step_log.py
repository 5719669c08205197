"""The log of a run that goes step by step: a line a step.

Tested by tests/pipeline/train/test_run_folder.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from models.input_file import parse_json, require_regular
from pipeline.errors import UserError


class StepLog:
    """A file of JSON lines, one a step, each with the key `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """Return the whole lines.

        Raises: UserError: when the file is damaged.
        """
        return [line for _, line in self._whole_lines()]

    @contextmanager
    def open_from(self, step: int) -> Iterator[TextIO]:
        """The log, open for more, without lines of steps that will be done again."""
        lines = [text for text, line in self._whole_lines() if line["step"] < step]
        shorter = self.path.with_suffix(".tmp")  # a kill leaves the one or the other, never neither
        shorter.write_text("".join(lines), encoding="utf-8")
        os.replace(shorter, self.path)
        with self.path.open("a", encoding="utf-8") as file:
            yield file

    def _whole_lines(self) -> list[tuple[str, dict[str, Any]]]:
        """Return each line as text and as JSON, except the last if a kill has cut it.

        Raises: UserError: when the file is damaged.
        """
        try:
            require_regular(self.path)
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise UserError(f"{self.path} is damaged: {error}; delete it") from error
        lines = text.splitlines(keepends=True)
        whole = enumerate(lines, 1) if text.endswith("\n") else enumerate(lines[:-1], 1)
        return [(line, self._parsed(number, line)) for number, line in whole]

    def _parsed(self, number: int, text: str) -> dict[str, Any]:
        try:
            line = parse_json(text)
        except ValueError as error:
            raise UserError(
                f"{self.path}, line {number}, is damaged ({error}); delete that line"
            ) from error
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            raise UserError(f"{self.path}, line {number}, has no step; delete that line")
        return line
