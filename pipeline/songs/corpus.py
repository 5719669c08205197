"""Listing a corpus: a folder per speaker, or a manifest. Names and sizes only; no audio is read."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.errors import UserError, first_names
from pipeline.songs.audio_suffixes import AUDIO_SUFFIXES
from pipeline.songs.manifest import MANIFEST_SUFFIXES, read_manifest, writable

_MOST_KINDS = 20  # of files that are not songs, in a notice

# Folders that operating systems and storage devices make, in lower case. None is a speaker.
_SYSTEM_FOLDERS = frozenset(
    (
        "$recycle.bin",
        "recycler",
        "system volume information",
        "$extend",
        "lost+found",
        "__macosx",
        "network trash folder",
        "temporary items",
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
        "@tmp",
        "@sharebin",
        "found.000",
    )
)


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
    system_folders: list[str] = field(default_factory=list)  # recycle bins and the like


def song_id_of(path: bytes) -> str:
    """Return the `/`-separated NFC name of a path; bytes that are not UTF-8 become `\\xNN`."""
    text = os.fsdecode(path).replace(os.sep, "/").lstrip("/")
    return unicodedata.normalize(
        "NFC", text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    )


def song_ids_of(path: bytes) -> tuple[str, str]:
    """Return the id of a song at a path of a plan, and the one that earlier versions gave it."""
    return song_id_of(os.path.normpath(path)), song_id_of(path)


def list_corpus(path: Path, speaker: str | None = None) -> Corpus:
    """List the songs of a folder tree (`root/SPEAKER/.../song.wav`) or of a CSV or JSONL manifest.

    speaker: name for every song, whatever folder it lies in.

    Raises: UserError: when there is no song, a song has no speaker, or two names are the same in
    NFC.
    """
    path = path.absolute()
    if speaker is not None:
        speaker = unicodedata.normalize("NFC", writable(speaker, "--speaker").strip())
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
        if os.fsdecode(entry.name).lower() in _SYSTEM_FOLDERS:
            corpus.system_folders.append(song_id_of(inside))
            continue
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
    for row in read_manifest(manifest, speaker):
        path = os.fsencode(row.path)
        song_id = song_ids_of(path)[0]  # ./a.wav and b/../a.wav are a.wav
        if song_id in ("", ".", ".."):
            raise UserError(f"{row.where}: {row.path} is a folder; name an audio file")
        place = song_id_of(os.path.normpath(os.path.join(os.fsencode(root), path)))
        if place in first_line:
            raise UserError(
                f"{row.where}: {row.path} was named in line {first_line[place]} already"
            )
        first_line[place] = row.line
        try:
            stat = os.stat(root / row.path)
            size, mtime_ns = stat.st_size, stat.st_mtime_ns
        except OSError:
            size, mtime_ns = 0, 0  # planned, so that it is quarantined and not lost
        who = unicodedata.normalize("NFC", row.speaker)
        corpus.songs.append(ListedSong(song_id, who, row.split, path, size, mtime_ns))
    return corpus


def named_as_planned(corpus: Corpus, planned: Iterable[str]) -> Corpus:
    """Return the corpus with the song_ids of a plan.

    Plans of earlier versions have song_ids as a manifest spelled them, such as ./a.wav.
    """
    names = {posixpath.normpath(song_id): song_id for song_id in planned}
    songs = [replace(song, song_id=names.get(song.song_id, song.song_id)) for song in corpus.songs]
    return replace(corpus, songs=songs)


def not_listed(corpus: Corpus) -> list[str]:
    """Return notices about files, folders and links of a corpus that are not listed as songs."""
    notices = []
    if corpus.ignored:
        most = corpus.ignored.most_common(_MOST_KINDS)
        kinds = ", ".join(f"{suffix} {n}" for suffix, n in most)
        rest = len(corpus.ignored) - len(most)
        if rest:
            others = corpus.ignored.total() - sum(n for _, n in most)
            kinds += f" and {rest} more kinds ({others} files)"
        notices.append(f"files that are not named like audio were skipped: {kinds}")
    if corpus.system_folders:
        names = first_names(corpus.system_folders)
        notices.append(f"folders of the operating system were skipped: {names}")
    if corpus.loops:
        notices.append(f"links that lead back up were skipped: {first_names(corpus.loops)}")
    return notices
