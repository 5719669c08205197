"""The short table that ends a training run.

Tested by tests/pipeline/test_cli.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.storage.step_log import StepLog
from pipeline.train.run_folder import Checkpoints
from pipeline.train.validation import PATHS, picture_path

if TYPE_CHECKING:
    from pipeline.train.trainer import TrainOutcome

_LOSSES = {
    "mel": "mel",
    "kl": "posterior to prior",
    "lf0": "predicted pitch",
    "fm": "features",
    "gen": "generator",
    "disc": "discriminator",
}
_MEASURES = {
    "mel": ("mel distance", ".2f"),
    "pitch_accuracy": ("right pitch", ".0%"),
    "f0_rmse_cents": ("pitch off by, cents", ".0f"),
    "voicing_error": ("voicing wrong", ".0%"),
}


def show_training(console: Console, outcome: TrainOutcome) -> None:
    """Show steps, losses and validation at both ends of the run, and the path of the voice."""
    lines = StepLog(outcome.run / "log.jsonl").lines()
    done = outcome.steps - outcome.begun_at
    console.print(f"{outcome.steps} steps done, {done} of them in this call", highlight=False)
    losses = [line for line in lines if "total" in line]
    if losses:
        console.print(_table("loss", losses, _LOSSES))
    validated = [line for line in lines if line.get("validation")]
    if validated:
        console.print(_validation(validated))
        picture = picture_path(outcome.run, validated[-1]["step"])
        console.print(f"picture    {escape(str(picture))}", highlight=False, soft_wrap=True)
    console.print(f"voice      {escape(str(outcome.checkpoint))}", highlight=False, soft_wrap=True)
    best = Checkpoints(outcome.run / "checkpoints").best()
    if best is not None and best.step != outcome.steps:
        console.print(f"best voice {escape(str(best.folder))}", highlight=False, soft_wrap=True)


def _table(title: str, lines: list[dict[str, Any]], names: Mapping[str, str]) -> Table:
    table = _columns(title, lines)
    for key, name in names.items():
        values = [line[key] for line in (lines[0], lines[-1])]
        table.add_row(name, *(f"{value:.3f}" for value in values))
    return table


def _validation(lines: list[dict[str, Any]]) -> Table:
    """Return a row for each measure: posterior and prior, and the original's where it has one."""
    table = _columns("validation, posterior / prior", lines)
    table.add_column("original", justify="right")
    first, last = (line["validation"] for line in (lines[0], lines[-1]))
    for key, (name, form) in _MEASURES.items():
        cells = [
            " / ".join(_number(numbers.get(f"{key}_{path}"), form) for path in PATHS)
            for numbers in (first, last)
        ]
        own = last.get(f"{key}_original")
        table.add_row(name, *cells, "" if own is None else _number(own, form))
    return table


def _columns(title: str, lines: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column(title)
    for line in (lines[0], lines[-1]):
        table.add_column(f"step {line['step']}", justify="right")
    return table


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
