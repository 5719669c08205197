"""The summaries of `convert`, for one song and for a folder.

Tested by tests/pipeline/convert/test_folder.py, tests/pipeline/convert/test_command.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.convert.folder import BatchOutcome
from pipeline.convert.ledger import CONVERTED
from pipeline.convert.result import Conversion
from pipeline.reports.command_summary import Summary, first_lines
from pipeline.songs.balance import QUARANTINED
from stages.types import Array


def song_summary(conversion: Conversion, page: Path | None = None) -> Summary:
    """Return duration, pitch range, speed and notices of one song. page: its report."""
    seconds = len(conversion.f0) * conversion.hop_length / conversion.sample_rate
    parts = [
        f"song     {conversion.source}, {seconds:.1f} s, pieces: {conversion.pieces}",
        f"pitch    {_range(conversion.target_f0[conversion.target_f0 > 0])}",
        f"time     {conversion.wall_s:.1f} s, {conversion.cpu_s:.1f} CPU s; real-time factor "
        f"{conversion.wall_s / max(seconds, 1e-9):.2f}",
        *(f"note     {notice}" for notice in conversion.notices),
        f"written  {conversion.output}",
        *([] if page is None else [f"report   {page}"]),
    ]
    return Summary(parts=parts, figures=_song_figures(conversion))


def _song_figures(conversion: Conversion) -> dict[str, Any]:
    """Return all fields but the contours."""
    values = {
        field.name: getattr(conversion, field.name)
        for field in dataclasses.fields(conversion)
        if field.name not in ("f0", "target_f0")
    }
    return values | {name: str(values[name]) for name in ("source", "output")}


def folder_summary(outcome: BatchOutcome, folder: Path) -> Summary:
    """Return songs by status and reason, hours, speed, problems and notices of a folder."""
    figures = _folder_figures(outcome)
    left_out = sorted(figures["left_out"].items())
    notices = sorted(figures["song_notices"].items())
    speed = "nothing to do: all songs are done"
    if outcome.work.tasks_run:
        speed = (
            f"speed    {figures['times_real_time']:.2f}x real time over {figures['wall_s']:.1f} s "
            f"(start-up {figures['start_up_s']:.1f} s)"
        )
    lines = [
        *(f"PROBLEM {problem}" for problem in figures["problems"]),
        *(f"note: {notice}" for notice in figures["notices"]),
        *(f"{song}: {fault}" for song, fault in left_out),
        *(f"{song}: {notice}" for song, each in notices for notice in each),
    ]
    parts = [
        f"songs    {figures['songs']} planned, {figures['converted']} converted",
        *(
            f"         {count} quarantined: {reason}"
            for reason, count in sorted(figures["quarantined"].items())
        ),
        f"audio    {figures['hours']:.3f} h",
        speed,
        *first_lines(lines),
        f"written  {folder}",
    ]
    return Summary(parts=parts, figures=figures)


def _folder_figures(outcome: BatchOutcome) -> dict[str, Any]:
    account, work = outcome.account, outcome.work
    work_s = max(1e-9, work.wall_s - work.start_up_s)
    return {
        "songs": account.planned,
        "converted": account.count(CONVERTED),
        "quarantined": dict(account.reasons(QUARANTINED)),
        "left_out": {
            entry.song_id: f"{entry.reason}: {entry.detail}"
            for entry in account.entries.values()
            if entry.status == QUARANTINED
        },
        "hours": account.hours,
        "songs_run": work.tasks_run,
        "wall_s": work.wall_s,
        "start_up_s": work.start_up_s,
        "times_real_time": work.audio_s / work_s if work.tasks_run else None,
        "song_notices": {
            entry.song_id: list(entry.notices)
            for entry in account.entries.values()
            if entry.notices
        },
        "notices": outcome.notices,
        "problems": account.problems,
    }


def _range(f0: Array) -> str:
    """Describe the 5th, 50th and 95th percentile of a contour's voiced frames."""
    if len(f0) == 0:
        return "no voiced frames"
    low, middle, high = np.percentile(f0, (5, 50, 95))
    return f"{low:.0f} to {high:.0f} Hz, median {middle:.0f} Hz"
