"""The log of a run that goes step by step: a line a step.

Tested by tests/pipeline/train/test_run_folder.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


class StepLog:
    """A file of JSON lines, one a step, each with the key `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._whole_lines()]

    @contextmanager
    def open_from(self, step: int) -> Iterator[TextIO]:
        """The log, open for more, without lines of steps that will be done again."""
        lines = [line for line in self._whole_lines() if json.loads(line)["step"] < step]
        shorter = self.path.with_suffix(".tmp")  # a kill leaves the one or the other, never neither
        shorter.write_text("".join(lines), encoding="utf-8")
        os.replace(shorter, self.path)
        with self.path.open("a", encoding="utf-8") as file:
            yield file

    def _whole_lines(self) -> list[str]:
        """A kill may have cut the last."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("}\n")]
