"""The summary of `train`.

Tested by tests/pipeline/test_cli.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pipeline.reports.command_summary import Summary
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
    "pitch_accuracy": ("pitch accuracy", ".0%"),
    "f0_rmse_cents": ("pitch error, cents", ".0f"),
    "voicing_error": ("voicing errors", ".0%"),
}


def train_summary(outcome: TrainOutcome) -> Summary:
    """Return steps, the first and last losses and validation of the run, and the voice's folder."""
    lines = StepLog(outcome.run / "log.jsonl").lines()
    steps_run = outcome.steps - outcome.begun_at
    losses = [line for line in lines if "total" in line]
    validated = [line for line in lines if line.get("validation")]
    best = Checkpoints(outcome.run / "checkpoints").best()
    parts: list[str | Table] = [f"{outcome.steps} steps done, {steps_run} of them in this call"]
    if losses:
        parts.append(_losses(losses))
    if validated:
        parts.append(_validation(validated))
        parts.append(f"picture    {picture_path(outcome.run, validated[-1]['step'])}")
    parts.append(f"voice      {outcome.checkpoint}")
    if best is not None and best.step != outcome.steps:
        parts.append(f"best voice {best.folder}")
    figures = {
        "steps": outcome.steps,
        "steps_run": steps_run,
        "losses": _ends(losses),
        "validation": _ends(validated),
        "voice": str(outcome.checkpoint),
        "best_voice": None if best is None else str(best.folder),
    }
    return Summary(parts=parts, figures=figures)


def _ends(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the first and the last line of a log."""
    return {"first": lines[0], "last": lines[-1]} if lines else {}


def _losses(lines: Sequence[dict[str, Any]]) -> Table:
    table = _columns("loss", lines)
    for key, name in _LOSSES.items():
        table.add_row(name, *(f"{line[key]:.3f}" for line in (lines[0], lines[-1])))
    return table


def _validation(lines: Sequence[dict[str, Any]]) -> Table:
    """Build a table of each measure for posterior and prior, and for the recording itself."""
    table = _columns("validation, posterior / prior", lines)
    table.add_column("recording", justify="right")
    first, last = (line["validation"] for line in (lines[0], lines[-1]))
    for key, (name, form) in _MEASURES.items():
        cells = [
            " / ".join(_number(numbers.get(f"{key}_{path}"), form) for path in PATHS)
            for numbers in (first, last)
        ]
        own = last.get(f"{key}_original")
        table.add_row(name, *cells, "" if own is None else _number(own, form))
    return table


def _columns(title: str, lines: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column(title)
    for line in (lines[0], lines[-1]):
        table.add_column(f"step {line['step']}", justify="right")
    return table


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
