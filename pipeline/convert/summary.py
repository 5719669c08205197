"""What a conversion says of itself when it is done."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pipeline.convert.folder import BatchOutcome
from pipeline.convert.ledger import CONVERTED
from pipeline.convert.result import Conversion
from pipeline.songs.balance import QUARANTINED

_MOST_LINES = 50


def show_conversion(console: Console, conversion: Conversion, page: Path | None = None) -> None:
    """The closing lines of a song's conversion. page: its report."""
    seconds = len(conversion.f0) * conversion.hop_length / conversion.sample_rate
    sung = conversion.target_f0[conversion.target_f0 > 0]
    lines = [
        f"song     {conversion.source}, {seconds:.1f} s, in pieces: {conversion.pieces}",
        f"to sing  {_range(sung)}",
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
        if field.name not in ("f0", "target_f0")
    }
    paths = {name: str(values[name]) for name in ("source", "output")}
    return values | paths


def write_conversion(path: Path, conversion: Conversion) -> None:
    _write_json(path, summary_of(conversion))


def batch_summary(outcome: BatchOutcome) -> dict[str, Any]:
    """The numbers of the closing table of a folder, as `--json` writes them."""
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


def write_batch(path: Path, outcome: BatchOutcome) -> None:
    _write_json(path, batch_summary(outcome))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    """In ASCII: names of files may be no valid text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="ascii")


def show_batch(console: Console, outcome: BatchOutcome, folder: Path) -> None:
    """The closing lines of a folder's conversion: songs by fate and reason, hours, speed."""
    numbers = batch_summary(outcome)
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(f"songs    {numbers['songs']} planned, {numbers['converted']} converted")
    for reason, count in sorted(numbers["quarantined"].items()):
        say(f"         {count} quarantined: {reason}")
    say(f"audio    {numbers['hours']:.3f} h")
    if outcome.work.tasks_run:
        say(
            f"speed    {numbers['times_real_time']:.2f}x real time over {numbers['wall_s']:.1f} s "
            f"(start-up {numbers['start_up_s']:.1f} s)"
        )
    else:
        say("nothing to do: every song is done")
    lines = [
        *(f"PROBLEM {problem}" for problem in numbers["problems"]),
        *(f"note: {notice}" for notice in numbers["notices"]),
        *(f"{song}: {fault}" for song, fault in sorted(numbers["left_out"].items())),
        *(f"{song}: {n}" for song, said in sorted(numbers["song_notices"].items()) for n in said),
    ]
    for line in lines[:_MOST_LINES]:
        say(line)
    if len(lines) > _MOST_LINES:
        say(f"… and {len(lines) - _MOST_LINES} more; --json writes all of it")
    say(f"written  {folder}")


def _range(sung: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    """Of the middle nine tenths."""
    if len(sung) == 0:
        return "nothing is voiced"
    low, middle, high = np.percentile(sung, (5, 50, 95))
    return f"{low:.0f} to {high:.0f} Hz, median {middle:.0f} Hz"
