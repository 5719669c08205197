"""What a conversion says of itself when it is done."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pipeline.conversion import Conversion


def show_conversion(console: Console, conversion: Conversion, page: Path | None = None) -> None:
    """The closing lines of a song's conversion. page: its report."""
    seconds = len(conversion.f0) * conversion.hop_length / conversion.sample_rate
    sung = conversion.f0_asked[conversion.f0_asked > 0]
    lines = [
        f"song     {conversion.source}, {seconds:.1f} s, {conversion.pieces} pieces",
        f"pitch    {_range(sung)}",
        f"time     {conversion.wall_s:.1f} s, {conversion.cpu_s:.1f} CPU s; real-time factor "
        f"{conversion.wall_s / max(seconds, 1e-9):.2f}",
        *(f"note     {notice}" for notice in conversion.notices),
        f"written  {conversion.output}",
    ]
    if page is not None:
        lines.append(f"report   {page}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def summary_of(conversion: Conversion) -> dict[str, Any]:
    """Everything but the contours, as JSON."""
    values = {
        field.name: getattr(conversion, field.name)
        for field in dataclasses.fields(conversion)
        if field.name not in ("f0", "f0_asked")
    }
    paths = {name: str(values[name]) for name in ("source", "output")}
    return values | paths


def write_conversion(path: Path, conversion: Conversion) -> None:
    path.write_text(json.dumps(summary_of(conversion), indent=2, ensure_ascii=False) + "\n")


def _range(sung: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    """Of the middle nine tenths."""
    if len(sung) == 0:
        return "nothing is voiced"
    low, middle, high = np.percentile(sung, (5, 50, 95))
    return f"{low:.0f} to {high:.0f} Hz, median {middle:.0f} Hz"
