"""Errors that end a run, in the kinds that a user has to tell apart.

Tested by tests/pipeline/test_cli.py.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# Control characters (C0, DEL, C1), line separators, overrides of the writing direction, surrogates.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


class UserError(Exception):
    """An error that the user can fix; the message says how. Exit status 2."""


class StorageFault(Exception):
    """A disk or cluster that is full, gone or failing. The same command resumes."""


class SongBug(Exception):
    """A bug of Cantor that a song triggered. Stops the run; never counted as bad input."""


class Interrupted(Exception):
    """A stop that was asked for. number: the signal: Ctrl-C, SIGTERM or SIGHUP."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number


def printable(text: str, keep: str = "") -> str:
    r"""Return `text` with control characters escaped, such as \x1b. keep: those left as they are.

    Bytes of a file name that are not UTF-8 appear as \xNN too.
    """
    if text.isprintable():
        return text
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that `os.fsdecode` could not decode
        code -= 0xDC00
    return _SHORT.get(character) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def one_line(error: object) -> str:
    """Return the message of a library's error without line breaks."""
    return " ".join(str(error).split())


def first_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first names of a list, and how many more there are."""
    rest = len(names) - most
    return ", ".join(map(printable, names[:most])) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def name_song_in_errors(song_id: str) -> Iterator[None]:
    """Add the song's name to every exception that leaves the block."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while working on {printable(song_id)}")
        raise
