"""Safe opening of untrusted files: regular files only; file and storage faults are kept apart.

Tested by tests/stages/decode/test_decoder.py.
"""

from __future__ import annotations

import errno
import os
import stat

from stages.errors import BadInput, Reason

FILE_FAULTS = {
    errno.ENOENT: (Reason.MISSING, "the file does not exist"),
    errno.ENOTDIR: (Reason.MISSING, "a part of its path is not a folder"),
    errno.ENAMETOOLONG: (Reason.MISSING, "its name is longer than this file system allows"),
    errno.ELOOP: (Reason.MISSING, "its symbolic links form a loop"),
    errno.EACCES: (Reason.NO_PERMISSION, "this user has no permission to read it"),
    errno.EPERM: (Reason.NO_PERMISSION, "this user has no permission to read it"),
}


def open_source(path: bytes) -> int:
    """Open a regular file for reading and return its descriptor.

    Raises: BadInput: when the file is at fault; OSError: when the storage is at fault.
    """
    try:
        # Checked before opening: opening a FIFO can hang, and opening a device can have effects.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadInput(Reason.UNREADABLE, "not a regular file")
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:
        raise BadInput(Reason.MISSING, "its name contains a zero byte") from None
    except OSError as error:
        if error.errno not in FILE_FAULTS:
            raise
        raise BadInput(*FILE_FAULTS[error.errno]) from None
