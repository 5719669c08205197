"""Faults that end a run, in the three kinds that a person has to tell apart."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can put right: the message says how, in a sentence. Exit status 2."""


class StorageFault(Exception):
    """The disk or the cluster, not the data: full, gone or failing. The same command resumes."""


class SongBug(Exception):
    """A bug of ours met while working on a song. Stops the run; never counted as bad input."""


class Interrupted(Exception):
    """The user pressed Ctrl-C."""


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
