"""The files of weights that a run reads: checkpoints and codebooks, identified by SHA-256."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError


@dataclass(frozen=True)
class WeightFile:
    """A file, or a folder of files, as it was when the run began.

    size: bytes. mtime_ns: of the youngest file.
    """

    path: str
    sha256: str
    size: int
    mtime_ns: int


def read_weights(
    paths: Mapping[str, str], known: Mapping[str, WeightFile] | None = None
) -> dict[str, WeightFile]:
    """Hash the weights, by the key that names their path, each path once. Imports torch.

    known: weights that need not exist, because the columns made with them are taken over.

    Raises: UserError: when a file cannot be read (the message names the key).
    """
    found = dict(known or {})
    if not paths.keys() - found.keys():
        return found
    from models.checkpoint import CheckpointError, sha256_of  # torch takes seconds to import

    read: dict[str, WeightFile] = {}
    for key in paths.keys() - found.keys():
        path = paths[key]
        try:
            if path not in read:
                size, mtime_ns = size_and_mtime(path)
                read[path] = WeightFile(path, sha256_of(path), size, mtime_ns)
        except FileNotFoundError as error:
            raise UserError(f"{key}: there is no file or folder {path}") from error
        except CheckpointError as error:
            raise UserError(f"{key}: {error}") from error
        except OSError as error:
            raise UserError(f"{key}: cannot read {path}: {error.strerror or error}") from error
        found[key] = read[path]
    return found


def size_and_mtime(path: str) -> tuple[int, int]:
    """Return the bytes of a file or of all files of a folder, and the time of the last change."""
    here = Path(path)
    files = [file for file in here.iterdir() if file.is_file()] if here.is_dir() else [here]
    stats = [file.stat() for file in files]
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


def require_unchanged(key: str, weights: WeightFile) -> None:
    """Check in a worker, which may be on another machine, that the weights have not changed.

    The content is read only if the size is the same and the time is not.

    Raises: UserError: when they changed since the run began, or are not there.
    """
    from models.checkpoint import sha256_of

    try:
        seen = size_and_mtime(weights.path)
        if seen == (weights.size, weights.mtime_ns) or (
            seen[0] == weights.size and sha256_of(weights.path) == weights.sha256
        ):
            return
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{key}: {weights.path} was there when the run began and is not there now (or not on "
            "the machine of every worker)"
        ) from error
    raise UserError(
        f"{key}: {weights.path} changed since the run began; put the file back, or extract with "
        "the new one into a new dataset"
    )


def require_safetensors(out: Path) -> None:
    """Check that `out` can be a file to write in the safetensors format.

    Raises: UserError: when it is a folder, has another suffix, or lies in a file.
    """
    if out.is_dir():
        raise UserError(
            f"{out} is a folder; name the file to write, such as {out / 'a.safetensors'}"
        )
    if out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors, the format that is written")
    if out.parent.exists() and not out.parent.is_dir():
        raise UserError(f"{out.parent} is a file, not a folder to write into")
