"""Display of a running training: on a terminal, in a driver elsewhere, or nowhere.

Tested by tests/pipeline/train/test_trainer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Protocol

from rich.console import Console

from pipeline.cluster.bar import Advance, show_bar


class Watch(Protocol):
    """A receiver of messages and progress. It can stop the run."""

    def say(self, line: str) -> None:
        """Show a message."""

    def begin(self, done: int, steps: int) -> None:
        """Start to show steps; `done` of `steps` are done."""

    def step(self, done: int, losses: Mapping[str, float]) -> bool:
        """Show that `done` steps are done. Return True to save the state and stop the run."""
        ...


class SilentWatch:
    """A watch that shows nothing."""

    def say(self, line: str) -> None:
        pass

    def begin(self, done: int, steps: int) -> None:
        pass

    def step(self, done: int, losses: Mapping[str, float]) -> bool:
        return False


class ConsoleWatch:
    """Lines and a bar, which ends when `stack` is closed."""

    def __init__(self, console: Console, stack: ExitStack) -> None:
        self._console, self._stack = console, stack
        self._advance: Advance | None = None
        self._done = 0

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def begin(self, done: int, steps: int) -> None:
        self._advance = self._stack.enter_context(show_bar(self._console, "train", steps, done))
        self._done = done

    def step(self, done: int, losses: Mapping[str, float]) -> bool:
        if self._advance is not None:
            self._advance(done - self._done, f"loss {losses['total']:.2f}")
        self._done = done
        return False
