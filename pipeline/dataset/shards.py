"""The shard format: schema, footer, atomic commit, reading. docs/shards.md specifies it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.ledger import SongEntry
from pipeline.errors import StorageFault, UserError
from pipeline.extract.config import SCHEMA_VERSION
from stages.pcm import Subtype
from stages.pitch_quality import PitchQuality
from stages.quality import Quality

ROW_GROUP_CLIPS = 32
XVECTOR_COLUMN = "xvector"
AUDIO_COLUMNS = tuple(field.name for field in fields(Quality))
PITCH_COLUMNS = tuple(field.name for field in fields(PitchQuality))
QUALITY_COLUMNS = AUDIO_COLUMNS + PITCH_COLUMNS

_IDENTITY: list[tuple[str, pa.DataType]] = [
    ("clip_id", pa.string()),
    ("song_id", pa.string()),
    ("speaker", pa.string()),
    ("clip_index", pa.int32()),
    ("clip_count", pa.int32()),
    ("start", pa.int64()),
    ("stop", pa.int64()),
    ("audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ("sample_rate", pa.int32()),
    ("num_samples", pa.int64()),
]
_F0 = [("f0", pa.list_(pa.float32()))]
_MEASURES = [(name, pa.float32()) for name in ("loudness_lufs", "gain_db", "peak_db")]
_OF_AUDIO = [(name, pa.float32()) for name in AUDIO_COLUMNS]
_OF_PITCH = [(name, pa.float32()) for name in PITCH_COLUMNS]

# What a clip has before its pitch is known, and what the pitch adds; units come between f0 and the
# measures.
AUDIO_SCHEMA = pa.schema(_IDENTITY + _MEASURES + _OF_AUDIO)
PITCH_SCHEMA = pa.schema(_F0 + _OF_PITCH)


@dataclass(frozen=True)
class EncoderIdentity:
    """What a trainer must know of the units in a column.

    Of ids (one number a frame, that of the nearest of `codebook_size` centres) dtype is int16 and
    dim is 1.
    """

    name: str
    dim: int
    dtype: str
    frame_rate_hz: float
    checkpoint_sha256: str | None
    codebook_sha256: str | None = None
    codebook_size: int | None = None

    @property
    def column(self) -> str:
        return "units_" + self.name.replace("-", "_")

    @property
    def frames_column(self) -> str:
        return "num_unit_frames_" + self.name.replace("-", "_")


@dataclass(frozen=True)
class XvectorIdentity:
    """What a trainer must know of the speaker embeddings in the column `xvector`."""

    dim: int
    checkpoint_sha256: str


@dataclass(frozen=True)
class Origin:
    """Of what shard of another dataset the audio was taken over."""

    fingerprint: str
    environment: dict[str, str]


# Keys of the `cantor` entry that are left out where they say nothing.
_OPTIONAL = ("xvector", "origin", "codebook_sha256", "codebook_size")


@dataclass(frozen=True)
class Footer:
    """The `cantor` entry of a shard's metadata."""

    schema_version: int
    fingerprint: str
    task: int
    task_id: str
    sample_rate: int
    hop_length: int
    subtype: Subtype
    f0_method: str
    encoders: list[EncoderIdentity]
    environment: dict[str, str]  # what may change last bits: libraries, devices, threads
    ledger: list[SongEntry]
    xvector: XvectorIdentity | None = None
    origin: Origin | None = None

    def to_json(self) -> str:
        values = _without_nothing(asdict(self))
        values["encoders"] = [_without_nothing(encoder) for encoder in values["encoders"]]
        values["sha256"] = _canonical_sha256(values)
        return json.dumps(values, ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Footer:
        """Raises: ValueError, TypeError or KeyError when `text` is not what `to_json` wrote."""
        values = json.loads(text)
        if not isinstance(values, dict) or "sha256" not in values:
            raise ValueError("its 'cantor' metadata has no checksum")
        if values.pop("sha256") != _canonical_sha256(values):
            raise ValueError("its 'cantor' metadata does not match its checksum")
        values["encoders"] = [EncoderIdentity(**encoder) for encoder in values["encoders"]]
        values["ledger"] = [SongEntry.from_dict(entry) for entry in values["ledger"]]
        for key, kind in (("xvector", XvectorIdentity), ("origin", Origin)):
            if key in values:
                values[key] = kind(**values[key])
        return Footer(**values)


def _without_nothing(values: dict[str, Any]) -> dict[str, Any]:
    return {key: v for key, v in values.items() if key not in _OPTIONAL or v is not None}


def _canonical_sha256(values: dict[str, Any]) -> str:
    """SHA-256 (hex) of `values` as JSON with sorted keys and without white space, in UTF-8."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def shard_schema(
    encoders: Sequence[EncoderIdentity],
    sample_rate: int,
    xvector: XvectorIdentity | None = None,
) -> pa.Schema:
    """Arrow schema of a shard, with the Hugging Face features in its metadata."""
    columns = [*_IDENTITY, *_F0]
    for encoder in encoders:
        columns += [(encoder.column, pa.binary()), (encoder.frames_column, pa.int32())]
    if xvector is not None:
        columns.append((XVECTOR_COLUMN, pa.list_(pa.float32())))
    schema = pa.schema(columns + _MEASURES + _OF_AUDIO + _OF_PITCH)
    features = {field.name: _hf_feature(field.type, sample_rate) for field in schema}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _hf_feature(kind: pa.DataType, sample_rate: int) -> dict[str, Any]:
    if pa.types.is_struct(kind):
        return {"sampling_rate": sample_rate, "_type": "Audio"}
    if pa.types.is_list(kind):
        # `Sequence` is read by every release of `datasets`, its successor `List` from 4.0 on.
        return {"feature": _hf_feature(kind.value_type, sample_rate), "_type": "Sequence"}
    names = {"float": "float32"}
    return {"dtype": names.get(str(kind), str(kind)), "_type": "Value"}


def write_shard(dataset: Path, shard_name: str, table: pa.Table, footer: Footer) -> Path:
    """Commit a shard: `.tmp`, fsync, rename, fsync of the folder. Doing it twice is harmless.

    table: columns of `shard_schema`. Without clips the file has zero row groups, since a row group
    of zero rows breaks `datasets.load_dataset`.
    """

    def write(file: BinaryIO) -> None:
        with shard_writer(file, footer) as writer:
            if table.num_rows:
                columns = table.select(writer.schema.names).cast(writer.schema)
                writer.write_table(columns, row_group_size=ROW_GROUP_CLIPS)

    return commit_file(dataset, f"data/{shard_name}", write)


def shard_writer(file: BinaryIO, footer: Footer) -> pq.ParquetWriter:
    """A writer of shards: what is compressed, indexed and summed up how."""
    schema = shard_schema(footer.encoders, footer.sample_rate, footer.xvector)
    schema = schema.with_metadata({**schema.metadata, "cantor": footer.to_json()})
    binary = {"audio.bytes", *(encoder.column for encoder in footer.encoders)}
    leaves = _leaf_paths(schema)
    return pq.ParquetWriter(
        file,
        schema,
        compression={leaf: "NONE" if leaf in binary else "ZSTD" for leaf in leaves},
        use_dictionary=["song_id", "speaker", "sample_rate", "clip_count"],
        write_page_checksum=True,
        write_statistics=[leaf for leaf in leaves if leaf not in binary],
    )


def _leaf_paths(schema: pa.Schema) -> list[str]:
    leaves = []
    for field in schema:
        if pa.types.is_struct(field.type):
            leaves += [f"{field.name}.{child.name}" for child in field.type]
        elif pa.types.is_list(field.type):
            leaves.append(f"{field.name}.list.element")
        else:
            leaves.append(field.name)
    return leaves


def commit_file(dataset: Path, relative: str, write: Callable[[BinaryIO], Any]) -> Path:
    """Write `dataset/relative` so that it is there whole or not at all.

    Raises: OSError of the storage; the half-written file is removed.
    """
    final = dataset / relative
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = dataset / ".tmp"
    folder.mkdir(exist_ok=True)
    temporary = folder / f"{final.name}.{secrets.token_hex(6)}"
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


def sweep(folder: Path) -> None:
    """Remove what killed writers of `commit_file` left half-written."""
    if (folder / ".tmp").is_dir():
        for path in (folder / ".tmp").iterdir():
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on the disk. Raises OSError of the storage."""
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


def write_dataset_info(dataset: Path, info: dict[str, Any]) -> None:
    """Write DATASET/dataset.json."""
    write_info(dataset, "dataset.json", info)


def read_dataset_info(dataset: Path) -> dict[str, Any]:
    """DATASET/dataset.json. Raises UserError when `dataset` is not one of ours."""
    if not (dataset / "dataset.json").exists():
        raise UserError(f"{dataset} is not a dataset: it has no dataset.json")
    return read_info(dataset / "dataset.json")


def read_info(path: Path) -> dict[str, Any]:
    """What `write_info` wrote of a run's settings. Raises: UserError when it is none of ours."""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(info, dict) or not {"fingerprint", "settings"} <= info.keys():
        raise UserError(f"{path} is not the {path.name} of this program")
    return info


def require_current(dataset: Path, info: dict[str, Any]) -> None:
    """Raises: UserError when dataset.json, `info`, tells of shards with other columns than ours."""
    version = info.get("schema_version")
    if version == SCHEMA_VERSION:
        return
    way = (
        f"`cantor extract --from {dataset} NEW` makes a dataset of the present format of its audio"
        if version in range(1, SCHEMA_VERSION)
        else "a newer version of this program made it"
    )
    raise UserError(
        f"{dataset} has shards of format {version}, and this program's format is "
        f"{SCHEMA_VERSION}; {way}"
    )


def units_in_words(info: dict[str, Any]) -> list[str]:
    """The encoders that dataset.json names, and which of them gave ids: ["mfcc (ids)"]."""
    words = []
    for number, name in enumerate(info["encoders"]):
        section = f"encoders.{name}" if number else "encoder"
        ids = f"{section}.codebook_sha256" in info["settings"]
        words.append(f"{name} (ids)" if ids else str(name))
    return words


def has_xvectors(info: dict[str, Any]) -> bool:
    """Whether dataset.json says that clips have x-vectors."""
    return "xvector.checkpoint_sha256" in info["settings"]


def iter_shards(dataset: Path) -> list[Path]:
    """Committed shards, in order of their names."""
    return sorted((dataset / "data").glob("*.parquet"))


def read_footer(path: Path) -> Footer:
    """Raises: UserError when the file is not a whole shard of ours, OSError of the storage."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
        if b"cantor" not in metadata:
            raise UserError(f"{path} has no 'cantor' metadata: not a shard of this program")
        return Footer.from_json(metadata[b"cantor"].decode())
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a whole Parquet file: {error}") from error
    except (pa.ArrowException, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{path} is damaged: {error}") from error  # thrift that does not parse


def read_footers(paths: Sequence[Path]) -> Iterator[tuple[Path, Footer | UserError]]:
    """Footers of many shards, read by a few threads; what is not a shard comes as its error."""

    def read(path: Path) -> Footer | UserError:
        try:
            return read_footer(path)
        except UserError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        yield from zip(paths, pool.map(read, paths), strict=True)


def is_disk_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def storage_fault(error: OSError) -> StorageFault:
    """What a failing disk means for the person running the job."""
    where = f" at {error.filename}" if error.filename else ""
    if is_disk_full(error):
        return StorageFault(f"no space left{where}; free some")
    return StorageFault(f"the storage failed{where}: {error.strerror or error}")
