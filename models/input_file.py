"""Files that others may have written: regular files only, and JSON of bounded size and depth.

Tested by tests/models/test_input_file.py.
"""

from __future__ import annotations

import errno
import json
import stat
from pathlib import Path
from typing import Any

MOST_JSON_BYTES = 4 << 20  # a list takes up to 22 times as much memory
_MOST_LEVELS = 50
_NAME_FAULTS = (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)


def require_regular(path: Path) -> None:
    """Check that `path` is a regular file, before it is opened: opening a FIFO can hang.

    Raises: ValueError: when it is something else (the message names it), or a part of its path is
    no folder; FileNotFoundError: when there is none.
    """
    try:
        mode = path.stat().st_mode
    except ValueError as error:
        raise ValueError(f"{str(path)!r} has a zero byte in its name") from error
    except OSError as error:
        if error.errno not in _NAME_FAULTS:
            raise
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path} is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is not a regular file")


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """Read a JSON file, with or without a byte order mark.

    Raises: ValueError: when it is not a regular file that can be read, not JSON, larger than
    `most_bytes` or nested too deep (one line that names it); FileNotFoundError: when there is none.
    """
    require_regular(path)
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > most_bytes:
        raise ValueError(f"{path} has more than {most_bytes >> 20} MiB of JSON")
    try:
        return parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises: ValueError: when it is not JSON, or nested too deep for code that walks it recursively.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level = [[value]]
    for _ in range(_MOST_LEVELS):
        parts = (one.values() if isinstance(one, dict) else one for one in level)
        level = [item for part in parts for item in part if isinstance(item, dict | list)]
    if level:
        raise ValueError(f"it is nested deeper than {_MOST_LEVELS} levels")
    return value


def shown(value: Any) -> str:
    """Return `repr` of a value for a message, cut after 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
