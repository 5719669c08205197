"""A mix of a voice's speakers: constant weights, or a CSV file of weights over time."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.input_file import require_regular
from pipeline.errors import UserError

_TIME = "time_s"
_SEPARATORS = ",;\t"
_HOW = f"write ann=0.7,ben=0.3, or the path of a CSV file with the columns {_TIME},ann,ben"


@dataclass(frozen=True, eq=False)
class SpeakerMix:
    """Weights of the speakers over time. Each row sums to 1.

    shares: (R, S), one row for each time. times_s: (R,) ascending; None: one row for all times.
    """

    shares: NDArray[np.float64]
    times_s: NDArray[np.float64] | None = None

    def weights(
        self, start_frame: int, frames: int, frames_per_second: float
    ) -> NDArray[np.float32]:
        """Return the weights of the frames from `start_frame` on, (F, S); (S,) for a constant mix.

        They are linear between two times, and constant before the first and after the last.
        """
        if self.times_s is None:
            return np.asarray(self.shares[0], np.float32)
        at = np.arange(start_frame, start_frame + frames) / frames_per_second
        mixed = np.empty((frames, self.shares.shape[1]), np.float32)
        for speaker, share in enumerate(self.shares.T):
            mixed[:, speaker] = np.interp(at, self.times_s, share)
        return mixed


def is_mix_file(text: str) -> bool:
    """Return whether `text` is the path of a CSV file and not a list of weights."""
    return text.lower().endswith(".csv") or "=" not in text


def read_mix(text: str, speakers: Sequence[str], rows: int | None = None) -> SpeakerMix:
    """Read a mix: "ann=0.7,ben=0.3" or the path of a CSV file.

    The file has a header, `time_s,ann,ben`, and rows with ascending times. Weights may have any
    scale; speakers without a column get 0. Separators are commas, semicolons or tabs; with
    semicolons and tabs a number may have a decimal comma.

    speakers: the voice's, in order. rows: S, the rows of its embedding if there are more.
    Raises: UserError: when the mix is wrong (the message names the line of a file).
    """
    width = len(speakers) if rows is None else rows
    if is_mix_file(text):
        return _read_file(Path(text), speakers, width)
    names, cells = [], []
    for part in text.split(","):
        name, equals, cell = part.rpartition("=")
        if not equals:
            raise UserError(f"voice.mix: '{part}' in '{text}' has no weight; {_HOW}")
        names.append(name.strip())
        cells.append(cell)
    where = f"voice.mix '{text}'"
    columns = _columns(names, speakers, where)
    numbers = [_number(cell, name, where) for cell, name in zip(cells, names, strict=True)]
    return SpeakerMix(_shares(numbers, columns, width, where)[None])


def _read_file(path: Path, speakers: Sequence[str], width: int) -> SpeakerMix:
    lines = _lines(path)
    _, (_, *names) = next(lines)
    columns = _columns(names, speakers, f"{path}, line 1")
    times: list[float] = []
    shares = []
    for where, (time, *cells) in lines:
        times.append(_number(time, _TIME, where))
        if len(times) > 1 and not times[-1] > times[-2]:
            raise UserError(
                f"{where}: {_TIME} is {time} after {times[-2]:g}; times must be ascending"
            )
        numbers = [_number(cell, name, where) for cell, name in zip(cells, names, strict=True)]
        shares.append(_shares(numbers, columns, width, where))
    if not times:
        raise UserError(f"{path} has no rows below its header; add one such as 0,1,0")
    return SpeakerMix(np.stack(shares), np.array(times))


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the position (for messages) and the cells of the header and of every row."""
    text = _text(path)
    header, _, _ = text.partition("\n")
    starts = {each: header.partition(each)[0].strip(' "\r') for each in _SEPARATORS}
    separator = next((each for each, start in starts.items() if start == _TIME), None)
    if separator is None:
        raise UserError(
            f"{path}, line 1: the header must begin with {_TIME} and name a speaker in every other "
            f"column, such as {_TIME},ann,ben"
        )
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names: list[str] = []
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if separator != "," and names:
                cells = [cell.replace(",", ".") for cell in cells]
            names = names or cells
            if len(cells) != len(names):
                raise UserError(
                    f"{where} has {len(cells)} cells, but the header has {len(names)}; every row "
                    "needs a time and a weight for each speaker"
                )
            yield where, cells
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not valid CSV: {error}") from error


def _text(path: Path) -> str:
    try:
        require_regular(path)
        return path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"voice.mix: the file '{path}' does not exist; {_HOW}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8; save it as 'CSV UTF-8'") from error
    except ValueError as error:
        raise UserError(f"voice.mix: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _columns(names: Sequence[str], speakers: Sequence[str], where: str) -> list[int]:
    """Return the positions of the named speakers."""
    if not names:
        raise UserError(f"{where} names no speaker; this voice has {', '.join(speakers)}")
    for name in names:
        if name not in speakers:
            raise UserError(
                f"{where}: '{name}' is not a speaker of this voice; it has {', '.join(speakers)}"
            )
        if names.count(name) > 1:
            raise UserError(f"{where} names '{name}' more than once; give one weight to each")
    return [speakers.index(name) for name in names]


def _number(text: str, name: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: {name} is '{text}'; it must be a number such as 0.5")
    return number


def _shares(
    numbers: Sequence[float], columns: Sequence[int], width: int, where: str
) -> NDArray[np.float64]:
    """Scale weights to a sum of 1, (S,)."""
    if min(numbers) < 0:
        raise UserError(f"{where}: a weight is {min(numbers):g}; it must be 0 or more")
    if max(numbers) == 0:
        raise UserError(f"{where}: all weights are 0; give at least one speaker a weight")
    shares = np.zeros(width)
    shares[columns] = np.array(numbers) / max(numbers)  # their sum may be infinite
    return np.asarray(shares / shares.sum())
