"""Figures of matplotlib as pictures in the colours of the page, light and dark.

tests/pipeline/reports/test_dataset_page.py and tests/pipeline/convert/test_page.py look at them.

Tested by tests/pipeline/reports/test_dataset_page.py, tests/pipeline/convert/test_page.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PIXELS_PER_INCH = 96  # of CSS
_DOTS_PER_INCH = 160


@dataclass(frozen=True)
class Theme:
    """Colours of a figure, those of the page around it."""

    ink: str
    faint: str
    accent: str
    other: str  # stands out against the accent


LIGHT = Theme(ink="#3c4450", faint="#dcdfe4", accent="#1f7a8c", other="#c2571a")
DARK = Theme(ink="#b9c0ca", faint="#343b45", accent="#5fb6c6", other="#f0a35e")


@dataclass(frozen=True)
class Picture:
    """A figure as PNG, for light pages and for dark ones. width, height: in CSS pixels."""

    light: bytes
    dark: bytes
    width: int
    height: int


def draw_picture(draw: Callable[[Figure, Theme], None], width: float, height: float) -> Picture:
    """Return the picture of a figure. width, height: in inches."""
    size = round(_PIXELS_PER_INCH * width), round(_PIXELS_PER_INCH * height)
    return Picture(_png(draw, LIGHT, width, height), _png(draw, DARK, width, height), *size)


def _png(draw: Callable[[Figure, Theme], None], theme: Theme, width: float, height: float) -> bytes:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    look: Any = {
        "font.size": 9.0,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.faint,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "grid.color": theme.faint,
        "axes.axisbelow": True,
    }
    with rc_context(look):
        figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", transparent=True)
    return buffer.getvalue()
