"""Faults that end a run, in the three kinds that a person has to tell apart."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: the message says how, in a sentence. Exit status 2."""


class StorageFault(Exception):
    """The disk or the cluster, not the data: full, gone or failing. The same command resumes."""


class SongBug(Exception):
    """A bug of ours met while working on a song. Stops the run; never counted as bad input."""


class Interrupted(Exception):
    """The user pressed Ctrl-C."""
