"""The command line, run in this process."""

from __future__ import annotations

import contextlib
import io
import sys

import pytest

from pipeline import cli


def cantor(*words: object, status: int = 0) -> str:
    """Run the command line with `words` and return what it printed on stdout and stderr.

    A process of its own would spend seconds on imports. Faults that the command line does not turn
    into a sentence propagate.
    """
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cantor", *map(str, words)])
        with (
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
            pytest.raises(SystemExit) as ended,
        ):
            cli.main()
    assert (ended.value.code or 0) == status, output.getvalue()
    return output.getvalue()
