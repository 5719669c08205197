"""Files that are written whole or not at all, and faults of the storage.

Tested by tests/pipeline/dataset/test_shards.py, tests/pipeline/test_cli.py.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from models.input_file import read_json
from pipeline.errors import StorageFault, UserError


def commit_file(dataset: Path, relative: str, write: Callable[[BinaryIO], Any]) -> Path:
    """Write `dataset/relative`, whole or not at all.

    Raises: OSError: when the storage fails, after the half-written file is removed; UserError: when
    the folder for half-written files is a link.
    """
    final = dataset / relative
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_folder(dataset) / f"{final.name}.{secrets.token_hex(6)}"
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(final.parent)
    return final


def temporary_folder(folder: Path) -> Path:
    """Make and return FOLDER/.tmp, for half-written files.

    Raises: UserError: when it is a link, behind which are files of others, or a file.
    """
    temporary = folder / ".tmp"
    if temporary.is_symlink() or (temporary.exists() and not temporary.is_dir()):
        raise UserError(f"{temporary} is not a folder of this program; remove it")
    temporary.mkdir(exist_ok=True)
    return temporary


def sweep(folder: Path) -> None:
    """Remove half-written files of killed writers.

    Raises: UserError: when FOLDER/.tmp is a link or a file.
    """
    if os.path.lexists(folder / ".tmp"):
        for path in temporary_folder(folder).iterdir():
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk. Raises: OSError: when the storage fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def write_info(folder: Path, name: str, info: dict[str, Any]) -> None:
    """Write FOLDER/NAME as JSON, whole or not at all."""
    text = json.dumps(info, indent=2, ensure_ascii=False) + "\n"
    commit_file(folder, name, lambda file: file.write(text.encode()))


def read_info(path: Path) -> dict[str, Any]:
    """Read what `write_info` wrote. Raises: UserError: when it is not a file of Cantor."""
    try:
        info = read_json(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    if (
        not isinstance(info, dict)
        or not isinstance(info.get("fingerprint"), str)
        or not isinstance(info.get("settings"), dict)
    ):
        raise UserError(f"{path} is not the {path.name} of this program; name another folder")
    return info


def is_disk_full(error: OSError) -> bool:
    """Return True when the disk is full, or the user's share of it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def storage_fault(error: OSError) -> StorageFault:
    """Return the error that tells the user about a failing disk."""
    where = f" at {error.filename}" if error.filename else ""
    if is_disk_full(error):
        return StorageFault(f"no space left{where}; free some")
    return StorageFault(f"the storage failed{where}: {error.strerror or error}")
