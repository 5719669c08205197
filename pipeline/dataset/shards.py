"""The shard format: schema, footer, atomic commit, reading. docs/shards.md specifies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from models.input_file import parse_json, require_regular
from pipeline.dataset.ledger import SongEntry
from pipeline.dataset.schema import (
    OLDEST_SUPPORTED,
    SCHEMA_VERSION,
    EncoderIdentity,
    XvectorIdentity,
    shard_schema,
)
from pipeline.errors import UserError, one_line
from pipeline.songs.balance import FILTERED, KEPT, QUARANTINED
from pipeline.storage.atomic import commit_file, read_info, write_info
from pipeline.storage.json_types import check_type
from stages.pcm import Subtype

ROW_GROUP_CLIPS = 32


@dataclass(frozen=True)
class Origin:
    """The shard of another dataset whose audio was taken over."""

    fingerprint: str
    environment: dict[str, str]


# Keys of dataset.json.
_INFO: dict[str, Any] = {
    "fingerprint": str,
    "settings": dict[str, Any],
    "speakers": list[str],
    "encoders": list[str],
    "f0_method": str,
    "sample_rate": int,
    "hop_length": int,
}

# Keys of the `cantor` entry that are left out where they are null.
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
    environment: dict[str, str]  # libraries, devices, threads: these may change last bits
    ledger: list[SongEntry]
    xvector: XvectorIdentity | None = None
    origin: Origin | None = None

    def to_json(self) -> str:
        values = _without_nulls(asdict(self))
        values["encoders"] = [_without_nulls(encoder) for encoder in values["encoders"]]
        values["sha256"] = _canonical_sha256(values)
        return json.dumps(values, ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Footer:
        """Return the footer that `to_json` wrote.

        Raises: ValueError: when the text is damaged, or keys are missing, unknown or wrong.
        """
        values = parse_json(text)
        if not isinstance(values, dict) or "sha256" not in values:
            raise ValueError("its 'cantor' metadata has no checksum")
        if values.pop("sha256") != _canonical_sha256(values):
            raise ValueError("its 'cantor' metadata does not match its checksum")
        check_type(Footer, values, "'cantor'")
        _check_ranges(values)
        values["encoders"] = [EncoderIdentity(**encoder) for encoder in values["encoders"]]
        values["ledger"] = [SongEntry.from_dict(entry) for entry in values["ledger"]]
        for key, kind in (("xvector", XvectorIdentity), ("origin", Origin)):
            if key in values:
                values[key] = kind(**values[key])
        return Footer(**values)


def _check_ranges(values: Mapping[str, Any]) -> None:
    """Raises: ValueError: when a number or a word of a `cantor` entry cannot be right."""
    positive = {key: values[key] for key in ("sample_rate", "hop_length")}
    for each in values["encoders"]:
        positive |= {f"{key} of an encoder": each[key] for key in ("dim", "frame_rate_hz")}
        if each["dtype"] not in ("float16", "int16"):
            raise ValueError(f"dtype of an encoder is {each['dtype']}")
        positive["codebook_size"] = each.get("codebook_size") or 1
    for key, number in positive.items():
        if number <= 0:
            raise ValueError(f"{key} is {number}; it must be above 0")
    for entry in values["ledger"]:
        if entry["status"] not in (KEPT, FILTERED, QUARANTINED) or entry["clips"] < 0:
            raise ValueError(
                f"{entry['song_id']} has the status {entry['status']} and {entry['clips']} clips"
            )


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {key: v for key, v in values.items() if key not in _OPTIONAL or v is not None}


def _canonical_sha256(values: dict[str, Any]) -> str:
    """Return the SHA-256 (hex) of `values` as JSON: UTF-8, sorted keys, no white space."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_shard(dataset: Path, shard_name: str, table: pa.Table, footer: Footer) -> Path:
    """Commit a shard: `.tmp`, fsync, rename, fsync of the folder. Doing it twice is harmless.

    table: has the columns of `shard_schema`; others are left out. Without clips the file has zero
    row groups, since a row group of zero rows breaks `datasets.load_dataset`.
    """

    def write(file: BinaryIO) -> None:
        with shard_writer(file, footer) as writer:
            if table.num_rows:
                columns = table.select(writer.schema.names).cast(writer.schema)
                writer.write_table(columns, row_group_size=ROW_GROUP_CLIPS)

    return commit_file(dataset, f"data/{shard_name}", write)


def shard_writer(file: BinaryIO, footer: Footer) -> pq.ParquetWriter:
    """Return a Parquet writer that compresses and indexes the columns of a shard as specified."""
    schema = shard_schema(
        footer.encoders, footer.sample_rate, footer.xvector, footer.schema_version
    )
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


def write_dataset_info(dataset: Path, info: dict[str, Any]) -> None:
    """Write DATASET/dataset.json."""
    write_info(dataset, "dataset.json", info)


def read_dataset_info(dataset: Path) -> dict[str, Any]:
    """Return DATASET/dataset.json, of any schema version.

    Raises: UserError: when `dataset` is not a dataset.
    """
    if not (dataset / "dataset.json").exists():
        raise UserError(f"{dataset} is not a dataset: it has no dataset.json")
    info = read_info(dataset / "dataset.json")
    check_dataset_info(info, str(dataset / "dataset.json"))
    return info


def check_dataset_info(info: Mapping[str, Any], where: str) -> None:
    """Raises: UserError: when keys of dataset.json have wrong types."""
    try:
        for key, kind in _INFO.items():
            if key in info:
                check_type(kind, info[key], key)
                if kind is int and info[key] < 1:
                    raise ValueError(f"{key} is {info[key]}; it must be above 0")
    except ValueError as error:
        raise UserError(f"{where} is damaged: {error}") from error


def read_supported_info(dataset: Path) -> dict[str, Any]:
    """Return DATASET/dataset.json.

    Raises: UserError: when `dataset` is not a dataset, or its schema version is not supported.
    """
    info = read_dataset_info(dataset)
    require_supported(dataset, info)
    return info


def require_whole(dataset: Path, info: Mapping[str, Any]) -> None:
    """Raises: UserError: when dataset.json lacks what `extract` and `report` need of it."""
    missing = sorted(_INFO.keys() - info.keys())
    if "schema_version" not in info["settings"]:
        missing.append("settings.schema_version")
    if missing:
        raise UserError(f"{dataset / 'dataset.json'} is damaged: it lacks {', '.join(missing)}")


def require_supported(
    dataset: object, info: Mapping[str, Any], oldest: int = OLDEST_SUPPORTED
) -> None:
    """Raises: UserError: when dataset.json, `info`, states another version than oldest to ours."""
    version = info.get("schema_version")
    if version in range(oldest, SCHEMA_VERSION + 1):
        return
    remedy = (
        f"run `cantor extract --from {dataset} NEW` to make a dataset of the present version"
        if version in range(1, oldest)
        else "install a newer Cantor to use it"
    )
    raise UserError(
        f"{dataset} has shards of schema version {version}, and this Cantor uses versions {oldest} "
        f"to {SCHEMA_VERSION}; {remedy}"
    )


def units_in_words(info: dict[str, Any]) -> list[str]:
    """Return the encoders that dataset.json names, marking those that gave ids: ["mfcc (ids)"]."""
    words = []
    for number, name in enumerate(info["encoders"]):
        section = f"encoders.{name}" if number else "encoder"
        ids = f"{section}.codebook_sha256" in info["settings"]
        words.append(f"{name} (ids)" if ids else str(name))
    return words


def note_on_trial_units(encoders: Iterable[str]) -> str | None:
    """Return a note when every encoder of a dataset is one for trying things out only."""
    from models.encoders import WITHOUT_WEIGHTS  # loads torch

    names = list(encoders)
    if not names or not set(names) <= set(WITHOUT_WEIGHTS):
        return None
    return (
        f"{' and '.join(names)} units are for trying things out only: a voice trained on them "
        "keeps the timbre of the source singer. For a real voice, run `cantor fetch-encoder "
        "contentvec-rvc`, then `cantor extract CORPUS DATASET encoder.name=contentvec768l12 "
        "encoder.checkpoint=checkpoints/hubert_base.pt`"
    )


def has_xvectors(info: dict[str, Any]) -> bool:
    """Tell whether dataset.json says that clips have x-vectors."""
    return "xvector.checkpoint_sha256" in info["settings"]


def iter_shards(dataset: Path) -> list[Path]:
    """Return the committed shards, sorted by name."""
    return sorted((dataset / "data").glob("*.parquet"))


def read_footer(path: Path) -> Footer:
    """Return the `cantor` entry of a shard.

    Raises: UserError: when the file is not a complete shard; OSError: when it cannot be read.
    """
    try:
        require_regular(path)
        metadata = pq.read_metadata(path).metadata or {}
        if b"cantor" not in metadata:
            raise UserError(f"{path} has no 'cantor' metadata: it is not a shard of Cantor")
        return Footer.from_json(metadata[b"cantor"].decode())
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a complete Parquet file: {one_line(error)}") from error
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(
            f"{path} is damaged: {one_line(error)}"
        ) from error  # thrift that does not parse


def read_footers(paths: Sequence[Path]) -> Iterator[tuple[Path, Footer | UserError]]:
    """Yield the footers of many shards, or the error of each file that is not a shard."""

    def read(path: Path) -> Footer | UserError:
        try:
            return read_footer(path)
        except UserError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        yield from zip(paths, pool.map(read, paths), strict=True)
