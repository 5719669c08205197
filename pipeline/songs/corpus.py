"""Listing a corpus: a folder per speaker, or a manifest. Names and sizes only; no audio is read."""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from pipeline.errors import UserError, first_names

# Names of files to list. Whether a file can be decoded, its content decides.
AUDIO_SUFFIXES = frozenset(
    ".wav .wave .rf64 .w64 .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .caf "
    ".m4a .m4b .aac .wma .mp4 .mkv .mov .webm .avi .ape .wv .tta .ac3".split()
)
MANIFEST_SUFFIXES = frozenset({".csv", ".jsonl"})


@dataclass(frozen=True, slots=True)
class ListedSong:
    """A song of the corpus, as listed. path: relative to the corpus, or absolute."""

    song_id: str
    speaker: str
    split: str
    path: bytes
    size: int  # bytes; 0 with mtime_ns 0 when a manifest names a file that is not there
    mtime_ns: int


@dataclass(frozen=True)
class Corpus:
    """A listed corpus: its songs in order of song_id, and the files and links passed over."""

    root: Path
    songs: list[ListedSong]
    ignored: Counter[str] = field(default_factory=Counter)  # by suffix: not audio by name
    loops: list[str] = field(default_factory=list)  # symbolic links that lead back up


def song_id_of(path: bytes) -> str:
    """Return the `/`-separated NFC name of a path; bytes that are not UTF-8 become `\\xNN`."""
    text = os.fsdecode(path).replace(os.sep, "/").lstrip("/")
    return unicodedata.normalize(
        "NFC", text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    )


def list_corpus(path: Path, speaker: str | None = None) -> Corpus:
    """List the songs of a folder tree (`root/SPEAKER/.../song.wav`) or of a CSV or JSONL manifest.

    speaker: name for every song, whatever folder it lies in.

    Raises: UserError: when there is no song, a song has no speaker, or two names are the same in
    NFC.
    """
    path = path.absolute()
    if speaker is not None:
        speaker = unicodedata.normalize("NFC", _writable(speaker, "--speaker").strip())
        if not speaker:
            raise UserError("--speaker is empty; name the speaker of the whole corpus")
    if path.is_dir():
        corpus = _list_folder(path, speaker)
    elif path.suffix.lower() in MANIFEST_SUFFIXES and path.is_file():
        corpus = _list_manifest(path, speaker)
    elif path.exists():
        raise UserError(f"{path} is neither a folder nor a .csv or .jsonl manifest; name one")
    else:
        raise UserError(f"there is no corpus at {path}; name a folder or a manifest")
    if not corpus.songs:
        folder = path if speaker is not None else path / "SPEAKER"
        raise UserError(f"no audio files in {path}; put them at {folder}/song.wav (or .flac, …)")
    corpus.songs.sort(key=lambda song: (song.song_id, song.path))
    for one, other in zip(corpus.songs, corpus.songs[1:], strict=False):
        if one.song_id == other.song_id:
            raise UserError(
                f"{one.path!r} and {other.path!r} have the same name in Unicode NFC; rename one of "
                "them"
            )
    return corpus


def _list_folder(root: Path, speaker: str | None) -> Corpus:
    corpus = Corpus(root, [])
    for relative, stat in _walk(os.fsencode(root), b"", [], corpus):
        folder, slash, _ = relative.partition(b"/")
        if speaker is None and not slash:
            raise UserError(
                f"{os.fsdecode(relative)} lies directly in {root}, so its speaker is unknown; move "
                f"it to {root}/SPEAKER/, or pass --speaker NAME for the whole corpus"
            )
        name = speaker if speaker is not None else song_id_of(folder)
        corpus.songs.append(
            ListedSong(
                song_id_of(relative), name, "train", relative, stat.st_size, stat.st_mtime_ns
            )
        )
    return corpus


def _walk(
    root: bytes, relative: bytes, above: list[tuple[int, int]], corpus: Corpus
) -> Iterator[tuple[bytes, os.stat_result]]:
    """Yield audio files under `relative`; follow symbolic links unless they lead back up."""
    folder = os.path.join(root, relative)
    try:
        stat = os.stat(folder)
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        shown = os.path.join(os.fsdecode(root), song_id_of(relative))
        raise UserError(f"cannot list the folder {shown}: {error.strerror}") from error
    above = [*above, (stat.st_dev, stat.st_ino)]
    for entry in entries:
        if entry.name.startswith(b"."):
            continue  # .ipynb_checkpoints, ._song.wav, .git
        inside = os.path.join(relative, entry.name)
        suffix = os.fsdecode(os.path.splitext(entry.name)[1]).lower()
        try:
            stat = entry.stat()
        except FileNotFoundError:  # a dangling link: planned, and quarantined as missing
            if suffix in AUDIO_SUFFIXES:
                yield inside, entry.stat(follow_symlinks=False)
            continue
        except OSError as error:
            if entry.is_symlink():  # a link to itself
                corpus.loops.append(song_id_of(inside))
                continue
            raise UserError(f"cannot read {song_id_of(inside)}: {error.strerror}") from error
        if entry.is_dir():
            if (stat.st_dev, stat.st_ino) in above:
                corpus.loops.append(song_id_of(inside))
            else:
                yield from _walk(root, inside, above, corpus)
        elif suffix in AUDIO_SUFFIXES:
            yield inside, stat
        else:
            corpus.ignored[suffix or "(no suffix)"] += 1


def _list_manifest(manifest: Path, speaker: str | None) -> Corpus:
    root = manifest.parent
    corpus = Corpus(root, [])
    first_line: dict[str, int] = {}
    for line, row in _read_manifest(manifest):
        where = f"{manifest}, line {line}"
        name = _text(row, "path", where)
        if not name:
            raise UserError(f"{where}: 'path' is missing")
        who = speaker if speaker is not None else _text(row, "speaker", where).strip()
        if not who:
            raise UserError(f"{where}: 'speaker' is missing (or pass --speaker NAME)")
        split = _text(row, "split", where) or "train"
        if not re.fullmatch(r"[A-Za-z0-9_]{1,64}", split):
            raise UserError(f"{where}: split {split!r} may hold letters, digits and _ only")
        song_id = song_id_of(os.fsencode(name))
        if song_id in first_line:
            raise UserError(f"{where}: {name} was named in line {first_line[song_id]} already")
        first_line[song_id] = line
        try:
            stat = os.stat(root / name)
            size, mtime_ns = stat.st_size, stat.st_mtime_ns
        except OSError:
            size, mtime_ns = 0, 0  # planned, so that it is quarantined and not lost
        who = unicodedata.normalize("NFC", who)
        corpus.songs.append(ListedSong(song_id, who, split, os.fsencode(name), size, mtime_ns))
    return corpus


def _text(row: dict[str, object], key: str, where: str) -> str:
    """Return the text of a manifest's cell; "" where it is absent."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: '{key}' must be text, not {value!r}")
    return _writable(value, f"{where}: '{key}'")


def _writable(text: str, what: str) -> str:
    """Return `text`, which must be able to name a file and be written to a dataset."""
    if "\0" in text:
        raise UserError(f"{what} has a NUL byte; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what} has a lone surrogate, which is no character") from error
    return text


def _read_manifest(manifest: Path) -> Iterator[tuple[int, dict[str, object]]]:
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            if manifest.suffix.lower() == ".jsonl":
                for number, text in enumerate(file, start=1):
                    if text.strip():
                        try:
                            row = json.loads(text)
                        except ValueError as error:  # also a number of too many digits
                            raise UserError(f"{manifest}, line {number}: {error}") from error
                        if not isinstance(row, dict):
                            raise UserError(f"{manifest}, line {number}: not a JSON object")
                        yield number, row
            else:
                yield from _read_csv(manifest, file)
    except OSError as error:
        raise UserError(f"cannot read {manifest}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{manifest} is not UTF-8: {error.reason} at byte {error.start}") from error


def _read_csv(manifest: Path, file: TextIO) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield each row by column, with the line that it begins in."""
    rows = csv.reader(file, strict=True)
    line = 1
    try:
        columns = next(rows, [])
        if "path" not in columns:
            raise UserError(
                f"{manifest}: the first line must name the columns path, speaker and "
                f"optionally split; it names {', '.join(sorted(columns)) or 'nothing'}"
            )
        line = rows.line_num + 1
        for row in rows:
            if row:
                yield line, dict(zip(columns, row, strict=False))
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{manifest}, line {line}: {error}; is a quote left open?") from error


def not_listed(corpus: Corpus) -> list[str]:
    """Return notices about files and links of a corpus that are not listed as songs."""
    notices = []
    if corpus.ignored:
        kinds = ", ".join(f"{suffix} {n}" for suffix, n in corpus.ignored.most_common(6))
        notices.append(f"files that are not named like audio were skipped: {kinds}")
    if corpus.loops:
        notices.append(f"links that lead back up were skipped: {first_names(corpus.loops)}")
    return notices
