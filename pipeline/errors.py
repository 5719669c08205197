"""Errors that end a run, in the kinds that a user has to tell apart.

Tested by tests/pipeline/test_cli.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """An error that the user can fix; the message says how. Exit status 2."""


class StorageFault(Exception):
    """A disk or cluster that is full, gone or failing. The same command resumes."""


class SongBug(Exception):
    """A bug of Cantor that a song triggered. Stops the run; never counted as bad input."""


class Interrupted(Exception):
    """The user pressed Ctrl-C."""


def first_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first names of a list, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def name_song_in_errors(song_id: str) -> Iterator[None]:
    """Add the song's name to every exception that leaves the block."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while working on {song_id}")
        raise
