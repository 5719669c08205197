"""Who looks on while a run trains: a terminal, a driver elsewhere, or nobody."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Protocol

from rich.console import Console

from pipeline.cluster.bar import Advance, show_bar


class Watch(Protocol):
    def say(self, line: str) -> None:
        """Something that a person should know."""

    def begin(self, done: int, steps: int) -> None:
        """The steps begin; `done` of `steps` are done."""

    def step(self, done: int, losses: Mapping[str, float]) -> bool:
        """One more is done. True: the run shall stop, its state kept."""
        ...


class Nobody:
    def say(self, line: str) -> None:
        pass

    def begin(self, done: int, steps: int) -> None:
        pass

    def step(self, done: int, losses: Mapping[str, float]) -> bool:
        return False


class OnConsole:
    """Lines and a bar, which ends when `held` does."""

    def __init__(self, console: Console, held: ExitStack) -> None:
        self._console, self._held = console, held
        self._advance: Advance | None = None
        self._done = 0

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def begin(self, done: int, steps: int) -> None:
        self._advance = self._held.enter_context(show_bar(self._console, "train", steps, done))
        self._done = done

    def step(self, done: int, losses: Mapping[str, float]) -> bool:
        if self._advance is not None:
            self._advance(done - self._done, f"loss {losses['total']:.2f}")
        self._done = done
        return False
