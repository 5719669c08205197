"""Standard output and standard error that may go away while a command runs."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

CLOSED_PIPE_STATUS = 141  # 128 + SIGPIPE, as other programs end


class _Stream(io.FileIO):
    """A standard stream. Once a write fails, it and all later ones are dropped."""

    def __init__(self, descriptor: int, fault: OSError | None) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.fault = fault
        self.dropped = False

    def write(self, data: Any, /) -> int:
        if self.fault is None:
            try:
                return super().write(data)
            except OSError as error:
                self.fault = error
        self.dropped = True
        return len(data)


@contextmanager
def keep_running_without_readers() -> Iterator[None]:
    """Let a command run on when nobody reads its output any more.

    Raises: SystemExit: when the block ends, with status 141 if it succeeded but could not print all
    of its output; OSError: when the file that it prints to is full.
    """
    _open_missing()
    stdout = _guard(sys.stdout, sys.__stdout__, 1)
    stderr = _guard(sys.stderr, sys.__stderr__, 2)
    if stderr is not None:
        sys.stderr = _text(stderr, sys.stderr, "backslashreplace")
    if stdout is not None:
        sys.stdout = _text(stdout, sys.stdout, "surrogateescape")
    try:
        yield
    except SystemExit as end:
        if stdout is None or end.code not in (0, None):
            raise
    if stdout is not None:
        sys.stdout.flush()
        if stdout.dropped and stdout.fault is not None:
            if stdout.fault.errno not in (errno.EPIPE, errno.EBADF, errno.EIO):
                raise stdout.fault
            sys.exit(CLOSED_PIPE_STATUS)
    sys.exit(0)


def _open_missing() -> None:
    """Open the null device in place of closed standard descriptors, which files would take."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free, which is this one


def _guard(stream: TextIO | None, original: TextIO | None, descriptor: int) -> _Stream | None:
    """Return a guarded stream, or None when the stream is not the process's own."""
    if stream is not original:
        return None
    closed = OSError(errno.EBADF, os.strerror(errno.EBADF)) if stream is None else None
    return _Stream(descriptor, closed)


def _text(raw: _Stream, stream: TextIO | None, errors: str) -> io.TextIOWrapper:
    """Return a text stream like `stream` that writes to `raw`. errors: when `stream` is None."""
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding if stream is not None else "utf-8",
        errors=stream.errors if stream is not None else errors,
        line_buffering=stream is None or stream.isatty() or stream is sys.__stderr__,
        write_through=bool(getattr(stream, "write_through", False)),
    )
