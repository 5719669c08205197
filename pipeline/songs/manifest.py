"""Manifests: CSV or JSONL files that name the songs of a corpus, with path, speaker and split.

Tested by tests/pipeline/songs/test_corpus.py.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pipeline.errors import UserError
from pipeline.storage.uri import refuse_uri

MANIFEST_SUFFIXES = frozenset({".csv", ".jsonl"})
SPLIT_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """A row of a manifest. where: the file and line, for messages. split: "train" if unnamed."""

    where: str
    line: int
    path: str
    speaker: str
    split: str


def read_manifest(manifest: Path, speaker: str | None = None) -> Iterator[ManifestRow]:
    """Yield the rows of a manifest.

    speaker: name for every row, instead of the manifest's.
    Raises: UserError: when the file cannot be read or a row is wrong. It names line and column.
    """
    for line, row in _read_rows(manifest):
        where = f"{manifest}, line {line}"
        path = _text(row, "path", where)
        if not path:
            raise UserError(f"{where}: 'path' is missing")
        refuse_uri(path, f"{where}: ")
        who = speaker if speaker is not None else _text(row, "speaker", where).strip()
        if not who:
            raise UserError(f"{where}: 'speaker' is missing (or pass --speaker NAME)")
        split = _text(row, "split", where).strip() or "train"
        if not SPLIT_NAME.fullmatch(split):
            raise UserError(f"{where}: split {split!r} may hold letters, digits and _ only")
        yield ManifestRow(where, line, path, who, split)


def writable(text: str, what: str) -> str:
    """Return `text`, which must be able to name a file and be written to a dataset.

    Raises: UserError: when it has a NUL byte or a lone surrogate.
    """
    if "\0" in text:
        raise UserError(f"{what} has a NUL byte; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what} has a lone surrogate, which is no character") from error
    return text


def _text(row: dict[str, object], key: str, where: str) -> str:
    """Return the text of a manifest's cell; "" where it is absent."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: '{key}' must be text, not {value!r}")
    return writable(value, f"{where}: '{key}'")


def _read_rows(manifest: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield each row by column, with the line that it begins in."""
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            if manifest.suffix.lower() == ".jsonl":
                yield from _read_jsonl(manifest, file)
            else:
                yield from _read_csv(manifest, file)
    except OSError as error:
        raise UserError(f"cannot read {manifest}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{manifest} is not UTF-8: {error.reason} at byte {error.start}") from error


def _read_jsonl(manifest: Path, file: TextIO) -> Iterator[tuple[int, dict[str, object]]]:
    for number, text in enumerate(file, start=1):
        if not text.strip():
            continue
        where = f"{manifest}, line {number}"
        try:
            pairs = json.loads(text, object_pairs_hook=tuple)
        except RecursionError as error:
            raise UserError(f"{where}: its values are nested too deeply") from error
        except ValueError as error:  # also a number of too many digits
            raise UserError(f"{where}: {error}") from error
        if not isinstance(pairs, tuple):
            raise UserError(f"{where}: not a JSON object")
        names = _column_names((name for name, _ in pairs), where)
        yield number, dict(zip(names, (value for _, value in pairs), strict=True))


def _read_csv(manifest: Path, file: TextIO) -> Iterator[tuple[int, dict[str, object]]]:
    header = file.readline()
    separator = next((mark for mark in ",;\t" if mark in header), ",")
    file.seek(0)
    rows = csv.reader(file, strict=True, delimiter=separator)
    line = 1
    try:
        columns = _column_names(next(rows, []), f"{manifest}, line 1")
        if "path" not in columns:
            raise UserError(
                f"{manifest}, line 1: it must name the columns path, speaker and optionally "
                f"split; it names {', '.join(sorted(columns)) or 'nothing'}"
            )
        line = rows.line_num + 1
        for row in rows:
            if len(row) > len(columns):
                raise UserError(
                    f"{manifest}, line {line}, column {len(columns) + 1}: {len(row)} cells, but "
                    f"the header has {len(columns)}; put a cell that has '{separator}' "
                    "in double quotes"
                )
            if row:
                yield line, dict(zip(columns, row, strict=False))
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{manifest}, line {line}: {error}; is a quote left open?") from error


def _column_names(names: Iterable[str], where: str) -> list[str]:
    """Return the names of columns in lower case, without spaces around them.

    Raises: UserError: when a name is empty or occurs twice.
    """
    columns: list[str] = []
    for number, name in enumerate(names, start=1):
        name = name.strip().lower()
        if not name:
            raise UserError(f"{where}, column {number}: it has no name; name it or remove it")
        if name in columns:
            first = columns.index(name) + 1
            raise UserError(
                f"{where}, column {number}: '{name}' is also column {first}; remove one of them"
            )
        columns.append(name)
    return columns
