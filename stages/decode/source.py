"""The file that is decoded, as a file object for libsndfile and FFmpeg.

Tested by tests/stages/decode/test_decoder.py.
"""

from __future__ import annotations

import os
from typing import Any

from stages.errors import BadInput, Reason
from stages.open_file import open_source

HEAD_BYTES = 4096  # cached, because headers are read in many small pieces


class SourceFile:
    """A regular file, read only, of which libraries see the view that `present` sets.

    A failed read is the storage's fault: it raises OSError. Where a C library swallows that,
    `check` raises it again.
    """

    def __init__(self, path: bytes) -> None:
        self.path = path
        self.fault: OSError | None = None
        self._prefix, self._start, self._at = b"", 0, 0
        self._head = b""
        self._fd = open_source(path)
        self.size = os.fstat(self._fd).st_size
        if self.size == 0:
            os.close(self._fd)
            raise BadInput(Reason.EMPTY, "the file has 0 bytes")
        self._head = self.read_at(0, HEAD_BYTES)

    def present(self, prefix: bytes, start: int) -> None:
        """Show libraries `prefix` and then the file from `start` on."""
        self._prefix, self._start, self._at = prefix, start, 0

    def read_at(self, offset: int, count: int) -> bytes:
        """Read bytes of the file itself, fewer at its end.

        Raises: OSError: when the storage fails.
        """
        if offset + count <= len(self._head):
            return self._head[offset : offset + count]
        try:
            return os.pread(self._fd, count, offset)
        except OSError as error:
            self.fault = OSError(error.errno, error.strerror, os.fsdecode(self.path))
            raise self.fault from None

    def read(self, count: int) -> bytes:
        data = self._prefix[self._at : self._at + count]
        if len(data) < count:
            offset = self._start + self._at + len(data) - len(self._prefix)
            data += self.read_at(offset, count - len(data))
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        done = 0
        while done < len(view) and (data := self.read(len(view) - done)):
            view[done : done + len(data)] = data
            done += len(data)
        return done

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        total = len(self._prefix) + self.size - self._start
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: total}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def check(self) -> None:
        """Raise the fault of the storage that a library has swallowed, if any."""
        if self.fault is not None:
            raise self.fault

    def close(self) -> None:
        os.close(self._fd)
