"""The closing tables of extract and verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.dataset.account import Account
from pipeline.dataset.verify import Verification
from pipeline.extract.command import ExtractOutcome
from pipeline.songs.balance import FILTERED, QUARANTINED

_MOST_SONGS = 50


def summary(outcome: ExtractOutcome) -> dict[str, Any]:
    """Return the numbers of the closing table, as `--json` writes them."""
    account, work = outcome.account, outcome.work
    total_s = sum(work.stage_s.values())
    work_s = max(1e-9, work.wall_s - work.start_up_s)
    return {
        "songs": account.planned,
        "kept": account.count("kept"),
        "filtered": dict(account.reasons("filtered")),
        "quarantined": dict(account.reasons("quarantined")),
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


def write_summary(path: Path, outcome: ExtractOutcome) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary(outcome), indent=2, ensure_ascii=False) + "\n")


def show_summary(console: Console, outcome: ExtractOutcome, dataset: Path) -> None:
    """Print the result of a run: songs by status and reason, hours, clips, shards, speed."""
    numbers = summary(outcome)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("songs", f"{numbers['songs']} planned, {numbers['kept']} kept")
    for status in (FILTERED, QUARANTINED):
        for reason, count in sorted(numbers[status].items()):
            table.add_row("", f"{count} {status}: {escape(reason)}")
    table.add_row("audio", f"{numbers['hours_in']:.3f} h in, {numbers['hours_kept']:.3f} h kept")
    for reason, seconds in sorted(numbers["dropped_s"].items()):
        table.add_row("", f"{seconds:.1f} s dropped: {escape(reason)}")
    table.add_row("clips", f"{numbers['clips']} in {numbers['shards']} shards")
    if outcome.work.tasks_run:
        table.add_row(
            "speed",
            f"{numbers['times_real_time']:.1f}x real time over {outcome.work.wall_s:.1f} s "
            f"(start-up {outcome.work.start_up_s:.1f} s)",
        )
        shares = sorted(numbers["stage_share"].items(), key=lambda item: -item[1])
        table.add_row("stages", ", ".join(f"{name} {share:.0%}" for name, share in shares))
    console.print(table, highlight=False)
    if not outcome.work.tasks_run:
        console.print("nothing to do: every task is committed", highlight=False)
    for group in numbers["duplicates"][:_MOST_SONGS]:
        console.print(f"same content: {', '.join(group)}", markup=False, soft_wrap=True)
    for notice in outcome.notices:
        console.print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)
    _show_problems(console, outcome.account.problems)
    console.print(f"dataset at {dataset}", markup=False, highlight=False, soft_wrap=True)


def show_verification(console: Console, result: Verification) -> None:
    """Print the result of verify, with the songs that are not in the dataset and why."""
    account = result.account
    _show_left_out(console, account)
    console.print(
        f"{result.shards} shards, {result.clips} clips, {result.audio_s / 3600:.3f} h of audio "
        f"read back; {account.planned} songs = {account.count('kept')} kept + "
        f"{account.count(FILTERED)} filtered + {account.count(QUARANTINED)} quarantined",
        highlight=False,
        soft_wrap=True,
    )
    _show_problems(console, result.problems)
    if not result.problems:
        console.print("the dataset is whole", highlight=False)


def _show_left_out(console: Console, account: Account) -> None:
    table = Table("song", "status", "reason", "detail", box=None, pad_edge=False)
    left_out = [e for e in account.entries.values() if e.status in (FILTERED, QUARANTINED)]
    left_out.sort(key=lambda e: (e.status != QUARANTINED, e.song_id))
    for entry in left_out[:_MOST_SONGS]:
        cells = (entry.song_id, entry.status, entry.reason or "", entry.detail or "")
        table.add_row(*map(escape, cells))
    if left_out:
        console.print(table, highlight=False)
    if len(left_out) > _MOST_SONGS:
        console.print(f"… and {len(left_out) - _MOST_SONGS} more; --export writes all")


def _show_problems(console: Console, problems: list[str]) -> None:
    for problem in problems[:_MOST_SONGS]:
        console.print(f"PROBLEM {problem}", markup=False, highlight=False, soft_wrap=True)
    if len(problems) > _MOST_SONGS:
        console.print(f"… and {len(problems) - _MOST_SONGS} more problems")
