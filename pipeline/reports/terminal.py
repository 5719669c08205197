"""The terminal: text from files cannot control it.

Tested by tests/pipeline/reports/test_terminal.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from pipeline.errors import printable


class TerminalConsole(Console):
    """A console on which control characters of any text are escaped.

    Text is shown as it is: no markup, no emoji codes, no highlighting. Line breaks in a text are
    kept; callers that print one line pass it through `printable`.
    """

    def __init__(self, stderr: bool = False, soft_wrap: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        super().__init__(
            stderr=stderr,
            soft_wrap=soft_wrap,
            width=None if stream.isatty() else 120,
            markup=False,
            emoji=False,
            highlight=False,
        )

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text of a string, which rich would strip of some control characters."""
        return super().render_str(printable(text, keep="\n"), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the parts of anything that is printed. rich's own cursor movements are kept."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text, keep="\n"), segment.style)
