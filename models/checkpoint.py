"""Checkpoint files: reading of foreign formats, reading and writing of safetensors.

No file is trusted: pickles go through `models.unpickler`, and every size that a file claims is
checked against the file itself. Tensors are views of the mapped file, so unused parts, such as the
optimizer's state or higher layers, are not read from disk.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import struct
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.input_file import read_json, require_regular
from models.unpickler import Budget, Opaque, Refused, Storage, plain, unpickle

__all__ = [
    "CheckpointError",
    "Opaque",
    "load_foreign",
    "load_weights",
    "read_safetensors",
    "save_safetensors",
    "sha256_of",
    "sibling_json",
    "weight_files",
]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_CONFIGURATION = ("config.json", "preprocessor_config.json")
CHECKPOINT_RECORD = "checkpoint.json"  # of a training run: lists the files with their SHA-256
OWN_HEADER = "cantor"  # entry in safetensors' metadata that marks Cantor's own format
_MAX_SAFETENSORS_HEADER = 100_000_000  # the format's own limit
_MOST_HEADER_BYTES = 8 << 20  # about 80,000 tensors
_MAX_ZIP_DIRECTORY = 8 << 20  # about 100,000 tensors; zipfile needs ten times as much memory

_OTHER_FILES = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the file: run `git lfs pull`"),
    (b"<", "is a web page, not a checkpoint: download the file itself"),
    (b"{", "is JSON text, not a checkpoint"),
    (b"RIFF", "is an audio file, not a checkpoint"),
    (b"fLaC", "is an audio file, not a checkpoint"),
    (b"OggS", "is an audio file, not a checkpoint"),
    (b"ID3", "is an audio file, not a checkpoint"),
    (b"\x1f\x8b", "is a gzip archive: unpack it first"),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it first"),
    (b"Rar!", "is a rar archive: unpack it first"),
    (b"GGUF", "is a GGUF file, which is not supported"),
    (b"lmgg", "is a whisper.cpp file; the PyTorch one from OpenAI is needed"),
    (b"\x89HDF", "is an HDF5 file, which is not supported"),
    (b"\x08", "seems to be an ONNX model: use an encoder named *-onnx"),
)


class CheckpointError(ValueError):
    """An error of a checkpoint file; the message is one sentence that names the file."""


def load_foreign(path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> Any:
    """Load a checkpoint file as plain dicts, lists, numbers, strings and tensors.

    Reads torch's containers (.pt, .pth, .bin, .ckpt: zip, or the one before torch 1.6) and
    safetensors, identified by content. No code of the file runs. DictConfig, ListConfig and
    Namespace become dict and list, objects of other classes an `Opaque`. Tensors are on the CPU, in
    the file's dtype, as views of the mapped file: clone what must outlive the file on disk.

    metadata: filled with that of a safetensors file.

    Raises: CheckpointError: when the file is of another format, damaged, or tries to run code.
    """
    path = Path(path)
    head = _head(path)
    if _is_safetensors(head):
        tensors, file_metadata = read_safetensors(path)
        if metadata is not None:
            metadata |= file_metadata
        return tensors
    require_recorded_sha256(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if head.startswith(b"PK"):
            return _load_zip(path, data)
        if head[257:262] == b"ustar":
            raise Refused("has torch's format from before 2017: save it again with torch >= 1")
        if head.startswith(b"\x80"):
            return _load_legacy(data)
        raise Refused(_what_it_is(head))
    except Refused as error:
        raise CheckpointError(f"{path} {error}") from error


def read_safetensors(
    path: str | os.PathLike[str], keys: Iterable[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read (tensors, metadata) of a safetensors file as views; keys: only these tensors.

    Raises: CheckpointError: when the file does not exist or is damaged.
    """
    path = Path(path)
    head = _head(path)
    if _is_safetensors(head) and struct.unpack_from("<Q", head)[0] > _MOST_HEADER_BYTES:
        raise CheckpointError(f"{path} has a header for more tensors than any network has")
    require_recorded_sha256(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys() if keys is None else keys
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (
        SafetensorError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError,
    ) as error:  # fmt: skip
        line = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is not a complete safetensors file ({line})") from error


def save_safetensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file atomically."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def require_recorded_sha256(path: Path) -> None:
    """Compare a file with the SHA-256 that lies beside it, if one does, once in this process.

    It may be in NAME.sha256.json, which fetch-encoder writes, or in a run's checkpoint.json.

    Raises: CheckpointError: when they differ, or the record is damaged.
    """
    for name, places in ((f"{path.name}.sha256.json", ("sha256",)),
                         (CHECKPOINT_RECORD, ("sha256", path.name))):  # fmt: skip
        record = path.with_name(name)
        try:
            expected = read_json(record)
            for place in places:
                expected = expected[place]
        except (FileNotFoundError, KeyError):
            continue
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{record} does not state a SHA-256 ({error})") from error
        require_sha256(path, expected, name)


def require_sha256(path: Path, expected: object, record: str) -> None:
    """Compare a file with its SHA-256, unless this process has done so since the file changed.

    record: name of the file that states it, for errors.

    Raises: CheckpointError: when it differs, or the file does not exist.
    """
    _require_file(path)
    status = path.stat()
    key = (path.resolve(), status.st_size, status.st_mtime_ns, str(expected))
    if key in _as_recorded:
        return
    if _file_sha256(path) != expected:
        raise CheckpointError(
            f"{path} is damaged or was replaced: its SHA-256 is not the one in {record}. Restore "
            f"it, or remove {record} if the change is yours"
        )
    _as_recorded.add(key)


_as_recorded: set[tuple[Any, ...]] = set()  # files that had the SHA-256 of their record


def weight_files(path: str | os.PathLike[str]) -> list[Path]:
    """List the weight files: the file itself, or those of a Hugging Face folder.

    Raises: CheckpointError: when a folder has none.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            try:
                parts = {str(part) for part in read_json(index)["weight_map"].values()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} does not list weight files ({error})") from error
            return [path / Path(part).name for part in sorted(parts)]
    raise CheckpointError(
        f"{path} has neither model.safetensors nor pytorch_model.bin: name the checkpoint file"
    )


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Load the content and safetensors metadata of a file, or of all weight files of a folder.

    Raises: CheckpointError: when a file is missing, damaged or not a dict of weights.
    """
    content: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for file in weight_files(path):
        part = load_foreign(file, metadata)
        if not isinstance(part, dict):
            raise CheckpointError(f"{file} has a {type(part).__name__}, not a network's weights")
        content |= part
    return content, metadata


def sibling_json(path: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Read a JSON file in a folder, or in the folder of a file; {} if there is none.

    Raises: CheckpointError: when it is not a JSON object.
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / name
    try:
        content = read_json(file)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return content


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Compute a SHA-256 in hex: of a file, or over a folder's configuration and weight files.

    Hugging Face's weights depend on the configuration in their folder, so a weights file of theirs
    is hashed together with it, like a folder.

    Raises: CheckpointError: when the file does not exist.
    """
    path = Path(path)
    folder, weights = path, {path.name}
    if path.is_dir():
        ends = ("*.safetensors", "*.bin", "*.index.json")
        weights = {p.name for end in ends for p in path.glob(end)}
    else:
        folder = path.parent
        if not _has_configuration_beside(path):
            return _file_sha256(path)
    total = hashlib.sha256()
    for name in sorted(weights | set(_CONFIGURATION)):
        if (folder / name).is_file():
            total.update(f"{name} {_file_sha256(folder / name)}\n".encode())
    return total.hexdigest()


def _has_configuration_beside(path: Path) -> bool:
    """Check whether this may be a Hugging Face weights file with its configuration."""
    if path.suffix not in (".safetensors", ".bin") or not path.is_file():
        return False
    if not any((path.parent / name).is_file() for name in _CONFIGURATION):
        return False
    if path.suffix == ".bin":
        return True
    try:
        with safe_open(path, "pt") as file:
            return OWN_HEADER not in (file.metadata() or {})  # Cantor's has its own configuration
    except SafetensorError:
        return False


def _file_sha256(path: Path) -> str:
    _require_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _require_file(path: Path) -> None:
    try:
        require_regular(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _head(path: Path) -> bytes:
    _require_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:  # of a read, which does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    if not head:
        raise CheckpointError(f"{path} is empty")
    return head


def _is_safetensors(head: bytes) -> bool:
    if len(head) < 9 or head[8:9] != b"{":
        return False
    (length,) = struct.unpack_from("<Q", head)
    return length <= _MAX_SAFETENSORS_HEADER


def _what_it_is(head: bytes) -> str:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for start, what in _OTHER_FILES:
        if text.startswith(start):
            return what
    return f"is not a checkpoint (it starts with the bytes {head[:8].hex(' ')})"


def _load_zip(path: Path, data: mmap.mmap) -> Any:
    """Load torch's container since 1.6: a zip of data.pkl and an uncompressed entry per storage."""
    try:
        with _ZipFile(path) as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (
        zipfile.BadZipFile, OSError, ValueError, NotImplementedError, LookupError, struct.error,
    ) as error:  # fmt: skip
        raise Refused(f"is truncated or damaged ({error}): download it again") from error
    entries = {info.filename: info for info in infos}
    if len(entries) < len(infos):
        raise Refused("is damaged (it has several entries of one name)")
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refused("is a zip archive, but not one of torch")
    (root,) = roots
    if f"{root}constants.pkl" in entries:
        raise Refused("is a TorchScript program, not a checkpoint")
    order = entries.get(f"{root}byteorder")
    if order is not None and _entry(data, order).tobytes() != sys.byteorder.encode():
        raise Refused("was written on a machine of another byte order")

    def read(storage: Storage) -> Tensor:
        entry = entries.get(f"{root}data/{storage.key}")
        if entry is None:
            raise Refused(f"lacks its storage {storage.key!r}: download it again")
        return _numbers(_entry(data, entry), storage.dtype)

    pickled = io.BytesIO(_entry(data, entries[f"{root}data.pkl"]))
    content, _ = unpickle(pickled, Budget(len(data)))
    return plain(content, read, Budget(len(data)))


class _ZipFile(io.FileIO):
    """A file whose zip directory, which zipfile reads at once, has to be of a sane size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:  # zipfile looks for the directory's end in the last 64 KiB
            size = 1 << 17
        if size > _MAX_ZIP_DIRECTORY:
            raise Refused("has a zip directory for more tensors than any network has")
        return super().read(size) or b""


def _entry(data: mmap.mmap, entry: zipfile.ZipInfo) -> memoryview:
    """Return the bytes of an uncompressed entry, in place."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise Refused("is compressed, which torch never writes: save it again with torch.save")
    header = data[entry.header_offset : entry.header_offset + 30]
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise Refused(f"is damaged (no entry where {entry.filename} should be)")
    start = entry.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
    if start + entry.file_size > len(data):
        raise Refused(f"is truncated within {entry.filename}: download it again")
    return memoryview(data)[start : start + entry.file_size]


def _load_legacy(data: mmap.mmap) -> Any:
    """Load torch's container before 1.6: consecutive pickles, then the storages' bytes."""
    pickles: list[Any] = []
    storages: dict[str, Storage] = {}
    budget = Budget(len(data))
    while len(pickles) < 5:
        content, pickled_storages = unpickle(data, budget)
        pickles.append(content)
        storages |= pickled_storages
        if pickles[0] != _LEGACY_MAGIC:
            raise Refused("is a pickle, but not a checkpoint of torch")
    _, protocol, system, content, keys = pickles
    if protocol != _LEGACY_PROTOCOL or not isinstance(keys, list):
        raise Refused("is damaged (it has no torch preamble)")
    if isinstance(system, dict) and not system.get("little_endian", True):
        raise Refused("was written on a machine of another byte order")

    raw = memoryview(data)[data.tell() :]
    data_of: dict[str, memoryview] = {}
    at = 0
    for key in keys:
        if not isinstance(key, str) or key not in storages:
            raise Refused("is damaged (it lists an unused storage)")
        if at + 8 > len(raw):
            raise Refused("is truncated: download it again")
        (count,) = struct.unpack_from("<q", raw, at)
        size = max(count, 0) * storages[key].dtype.itemsize
        data_of[key] = raw[at + 8 : at + 8 + size]
        at += 8 + size

    def read(storage: Storage) -> Tensor:
        if storage.key not in data_of:
            raise Refused(f"lacks its storage {storage.key!r}: download it again")
        return _numbers(data_of[storage.key], storage.dtype)

    return plain(content, read, Budget(len(data)))


def _numbers(raw: memoryview, dtype: torch.dtype) -> Tensor:
    """Return the elements of `dtype` in `raw`, in place where they are aligned."""
    count = len(raw) // dtype.itemsize
    if not count:
        return torch.empty(0, dtype=dtype)
    if dtype == torch.bool:  # bytes other than 0 and 1 would be undefined behaviour
        return torch.frombuffer(raw, dtype=torch.uint8).ne(0)
    numbers = torch.frombuffer(raw, dtype=dtype, count=count)
    return numbers if numbers.data_ptr() % dtype.itemsize == 0 else numbers.clone()
