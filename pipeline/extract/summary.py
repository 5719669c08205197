"""The summaries of `extract` and `verify`.

Tested by tests/pipeline/test_cli.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.dataset.account import Account
from pipeline.dataset.verify import Verification
from pipeline.extract.command import ExtractOutcome
from pipeline.reports.command_summary import MOST_LINES, Summary, first_lines, text_table
from pipeline.songs.balance import FILTERED, QUARANTINED


def extract_summary(outcome: ExtractOutcome, dataset: Path) -> Summary:
    """Return songs by status and reason, hours, clips, shards, speed and stages."""
    figures = _figures(outcome)
    work = outcome.work
    rows = [("songs", f"{figures['songs']} planned, {figures['kept']} kept")]
    for status in (FILTERED, QUARANTINED):
        rows += [("", f"{n} {status}: {reason}") for reason, n in sorted(figures[status].items())]
    rows.append(("audio", f"{figures['hours_in']:.3f} h in, {figures['hours_kept']:.3f} h kept"))
    dropped = sorted(figures["dropped_s"].items())
    rows += [("", f"{seconds:.1f} s dropped: {reason}") for reason, seconds in dropped]
    rows.append(("clips", f"{figures['clips']} in {figures['shards']} shards"))
    if work.tasks_run:
        speed = f"{figures['times_real_time']:.1f}x real time over {work.wall_s:.1f} s"
        rows.append(("speed", f"{speed} (start-up {work.start_up_s:.1f} s)"))
        shares = sorted(figures["stage_share"].items(), key=lambda item: -item[1])
        rows.append(("stages", ", ".join(f"{name} {share:.0%}" for name, share in shares)))
    parts: list[str | Table] = [
        text_table(rows),
        *([] if work.tasks_run else ["nothing to do: all tasks are done"]),
        *first_lines([f"same content: {', '.join(group)}" for group in figures["duplicates"]]),
        *(f"note: {notice}" for notice in outcome.notices),
        *first_lines([f"PROBLEM {problem}" for problem in figures["problems"]]),
        f"dataset at {dataset}",
    ]
    return Summary(parts=parts, figures=figures)


def _figures(outcome: ExtractOutcome) -> dict[str, Any]:
    account, work = outcome.account, outcome.work
    total_s = sum(work.stage_s.values())
    work_s = max(1e-9, work.wall_s - work.start_up_s)
    return {
        **_song_counts(account),
        "hours_in": account.hours_in,
        "hours_kept": account.hours_kept,
        "dropped_s": account.dropped_s(),
        "clips": account.clips,
        "shards": account.shards,
        "tasks_run": work.tasks_run,
        "wall_s": work.wall_s,
        "start_up_s": work.start_up_s,
        "times_real_time": work.audio_s / work_s if work.tasks_run else None,
        "stage_share": {k: v / total_s for k, v in work.stage_s.items()} if total_s else {},
        "duplicates": account.duplicates(),
        "notices": outcome.notices,
        "problems": account.problems,
    }


def verify_summary(result: Verification, ledger: Path | None = None) -> Summary:
    """Return the result of `verify`, with every song that is not in the dataset and the reason.

    ledger: the file that the ledger was exported to.
    """
    account = result.account
    left_out = [e for e in account.entries.values() if e.status in (FILTERED, QUARANTINED)]
    left_out.sort(key=lambda e: (e.status != QUARANTINED, e.song_id))
    rows = [(e.song_id, e.status, e.reason or "", e.detail or "") for e in left_out]
    parts: list[str | Table] = [
        *([text_table(rows[:MOST_LINES], ("song", "status", "reason", "detail"))] if rows else []),
        *first_lines([""] * len(rows), "--export writes all of them")[MOST_LINES:],
        f"{result.shards} shards, {result.clips} clips, {result.audio_s / 3600:.3f} h of audio "
        f"read back; {account.planned} songs = {account.count('kept')} kept + "
        f"{account.count(FILTERED)} filtered + {account.count(QUARANTINED)} quarantined",
        *first_lines([f"PROBLEM {problem}" for problem in result.problems]),
        *([] if result.problems else ["the dataset is intact"]),
        *([] if ledger is None else [f"ledger written to {ledger}"]),
    ]
    figures = {
        **_song_counts(account),
        "shards": result.shards,
        "clips": result.clips,
        "hours": result.audio_s / 3600,
        "left_out": [
            dict(zip(("song_id", "status", "reason", "detail"), row, strict=True)) for row in rows
        ],
        "problems": result.problems,
    }
    return Summary(parts=parts, figures=figures)


def _song_counts(account: Account) -> dict[str, Any]:
    return {
        "songs": account.planned,
        "kept": account.count("kept"),
        "filtered": dict(account.reasons(FILTERED)),
        "quarantined": dict(account.reasons(QUARANTINED)),
    }
