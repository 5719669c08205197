"""Opening a file of unknown origin: only a regular file, and its faults told from the storage's."""

from __future__ import annotations

import errno
import os
import stat

from stages.errors import BadInput, Reason

FILE_FAULTS = {
    errno.ENOENT: (Reason.MISSING, "there is no such file"),
    errno.ENOTDIR: (Reason.MISSING, "a part of its path is not a folder"),
    errno.ENAMETOOLONG: (Reason.MISSING, "its name is longer than this file system allows"),
    errno.ELOOP: (Reason.MISSING, "its symbolic links lead in a circle"),
    errno.EACCES: (Reason.NO_PERMISSION, "this user may not read it"),
    errno.EPERM: (Reason.NO_PERMISSION, "this user may not read it"),
}


def open_source(path: bytes) -> int:
    """A file descriptor for reading.

    Raises: BadInput for what is wrong with the file, OSError for what is wrong with the storage.
    """
    try:
        # Asked before opening, which alone can hang (a FIFO) or act (a device).
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadInput(Reason.UNREADABLE, "not a regular file")
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:
        raise BadInput(Reason.MISSING, "its name holds a zero byte") from None
    except OSError as error:
        if error.errno not in FILE_FAULTS:
            raise
        raise BadInput(*FILE_FAULTS[error.errno]) from None
