"""What a trainer must know of a dataset before it reads a clip: footers and narrow columns."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.dataset.schema import SCHEMA_VERSION, EncoderIdentity
from pipeline.dataset.shards import Footer
from pipeline.dataset.unit_frames import split_of
from pipeline.errors import UserError
from stages.errors import Reason
from stages.pcm import Subtype

_READERS = 16  # threads that read footers; they mostly wait for the storage


@dataclass(frozen=True)
class Folder:
    """A dataset's folder on any file system of pyarrow. name: as the user wrote it."""

    name: str
    filesystem: pafs.FileSystem
    root: str

    def shards(self) -> list[str]:
        """Names of the files in `data`, in order. Raises UserError where that cannot be read."""
        selector = pafs.FileSelector(f"{self.root}/data", allow_not_found=True)
        with name_folder_in_errors(f"{self.name}/data"):
            found = self.filesystem.get_file_info(selector)
        return sorted(info.base_name for info in found if info.extension == "parquet")

    def where(self, shard: str) -> str:
        return f"{self.name}/data/{shard}"

    @contextlib.contextmanager
    def open_shard(self, shard: str) -> Iterator[pq.ParquetFile]:
        """Raises: UserError naming the shard, for whatever goes wrong in the block too."""
        with (
            name_folder_in_errors(self.where(shard)),
            self.filesystem.open_input_file(f"{self.root}/data/{shard}") as source,
            pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True) as file,
        ):
            yield file

    def read_info(self) -> dict[str, Any]:
        """dataset.json. Raises UserError when this is no dataset, or one of another format."""
        where = f"{self.name}/dataset.json"
        try:
            with self.filesystem.open_input_file(f"{self.root}/dataset.json") as file:
                info = json.loads(file.read())
        except FileNotFoundError as error:
            raise UserError(
                f"{self.name} is not a dataset: it has no dataset.json; `extract` makes datasets"
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(f"{where} cannot be read: {error}") from error
        if not isinstance(info, dict) or not {"fingerprint", "settings"} <= info.keys():
            raise UserError(f"{where} is not the dataset.json of this program")
        if info.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
            raise UserError(
                f"{self.name} has shards of format {info['schema_version']}, and this "
                f"program's format is {SCHEMA_VERSION}; `extract --from` makes a dataset of the "
                f"present format of an older one"
            )
        return info


def open_folder(path: str | os.PathLike[str], filesystem: pafs.FileSystem | None) -> Folder:
    """A local folder, a URI (`s3://bucket/dataset`), or a path on `filesystem`.

    Raises: UserError for a URI that pyarrow does not know.
    """
    name = os.fspath(path).rstrip("/")
    if filesystem is not None:
        return Folder(name, filesystem, name)
    if "://" not in name:
        return Folder(name, pafs.LocalFileSystem(), str(Path(name).absolute()))
    try:
        found, root = pafs.FileSystem.from_uri(name)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name} cannot be opened: {error}") from error
    return Folder(name, found, root)


@contextlib.contextmanager
def name_folder_in_errors(where: str) -> Iterator[None]:
    """Makes what storage and Parquet complain of a UserError that says where it was."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where} cannot be read: {error}; `verify` says whether shards are damaged"
        ) from error


@dataclass(frozen=True)
class Identity:
    """What the clips and units are of: a voice belongs to data of the same."""

    sample_rate: int
    hop_length: int
    encoder: EncoderIdentity
    f0_method: str
    fingerprint: str
    speakers: tuple[str, ...]  # sorted; a speaker's number is its place
    subtype: Subtype


@dataclass(frozen=True)
class ClipIndex:
    """The clips of a split in the order of shards and rows; (N,) arrays, one entry a clip.

    Of a million clips it takes 100 MB: 24 bytes a clip, and its name.
    """

    folder: Folder
    identity: Identity
    left_out: dict[str, int]  # clips of the split that are not here, by reason
    shards: tuple[str, ...]
    shard_of: NDArray[np.int32]  # (G,) of a row group: place in shards
    number_of: NDArray[np.int32]  # (G,) of a row group: which of its shard's
    song_ids: tuple[str, ...]
    clip_ids: pa.StringArray
    song: NDArray[np.int32]  # place in song_ids
    speaker: NDArray[np.int32]  # place in identity.speakers
    num_samples: NDArray[np.int64]
    group: NDArray[np.int32]  # row groups, counted through all shards
    row: NDArray[np.int32]  # in the row group

    def __len__(self) -> int:
        return len(self.num_samples)

    def take(self, chosen: NDArray[np.bool_]) -> ClipIndex:
        """Only the clips where `chosen` (N,) is true; songs and speakers keep their numbers."""
        per_clip = {name: getattr(self, name)[chosen] for name in _PER_CLIP}
        return replace(self, clip_ids=self.clip_ids.filter(pa.array(chosen)), **per_clip)

    def singers(self) -> dict[str, str]:
        """Who sings each song."""
        songs, first = np.unique(self.song, return_index=True)
        speakers = self.identity.speakers
        return {
            self.song_ids[song]: speakers[speaker]
            for song, speaker in zip(songs, self.speaker[first], strict=True)
        }


_PER_CLIP = ("song", "speaker", "num_samples", "group", "row")
_NARROW = ("clip_id", "song_id", "speaker", "num_samples")
_PITCH = ("speaker", "f0_low_hz", "f0_high_hz", "voiced_ratio", "num_samples")
_OF_A_CLIP = ("audio", "decode", "resample", "slice", "loudness", "f0")  # sections of settings


def read_index(folder: Folder, split: str, encoder: str | None, min_frames: int) -> ClipIndex:
    """The clips of `split` of `min_frames` or more. Reads footers and narrow columns.

    encoder: whose units are wanted; None where the dataset has one encoder's.
    Speakers are those of these clips, so that each has something to be learnt from.

    Raises: UserError for what is no dataset or has no such split, encoder or clips, for units that
    are ids of a codebook, for f0 without gaps, and for shards that do not belong together.
    """
    _refuse_filled_f0(folder, folder.read_info())
    names = _shards_of_split(folder, split)
    with ThreadPoolExecutor(_READERS) as pool:
        shards = list(pool.map(lambda name: _read_shard(folder, name, min_frames), names))
    first = _agreed(folder, shards)
    identity = _encoder(folder, first, encoder)
    clips = pa.concat_tables([shard.clips for shard in shards])
    too_short = sum(shard.too_short for shard in shards)
    if not len(clips):
        short = f"; {too_short} are shorter than data.min_frames, {min_frames}" if too_short else ""
        raise UserError(f"{folder.name} has no clips to train from in its split '{split}'{short}")
    speakers, speaker = _numbered(clips["speaker"])
    song_ids, song = _numbered(clips["song_id"])
    counts = [shard.groups for shard in shards]
    offsets = np.repeat(np.cumsum([0, *counts[:-1]]), [len(shard.clips) for shard in shards])
    return ClipIndex(
        folder=folder,
        identity=Identity(
            first.sample_rate,
            first.hop_length,
            identity,
            first.f0_method,
            first.fingerprint,
            speakers,
            first.subtype,
        ),
        left_out={str(Reason.TOO_SHORT): too_short} if too_short else {},
        shards=tuple(names),
        shard_of=np.repeat(np.arange(len(names), dtype=np.int32), counts),
        number_of=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        song_ids=song_ids,
        clip_ids=clips["clip_id"].combine_chunks(),
        song=song,
        speaker=speaker,
        num_samples=clips["num_samples"].to_numpy(),
        group=(clips["group"].to_numpy() + offsets).astype(np.int32),
        row=clips["row"].to_numpy(),
    )


def extraction_of(folder: Folder, encoder: str) -> dict[str, Any] | None:
    """The settings by section that made the clips and the units of `encoder`; None: not stated.

    Raises: UserError.
    """
    config = folder.read_info().get("config")
    if config is None:
        return None
    settings = {"encoder": config["encoder"]}
    if config["encoder"]["name"] != encoder:
        settings = {"encoder": {"name": encoder, **config["encoders"][encoder]}}
    return {section: config[section] for section in _OF_A_CLIP} | settings


def pitch_of_speakers(index: ClipIndex) -> dict[str, float]:
    """Hz in the middle of what each speaker sings in these shards; without those who only speak.

    Of a clip it is the middle of its low and high end; clips count by how much of them is voiced.
    Raises: UserError.
    """

    def read(name: str) -> pa.Table:
        with index.folder.open_shard(name) as file:
            return file.read(columns=list(_PITCH), use_threads=False)

    with ThreadPoolExecutor(_READERS) as pool:
        clips = pa.concat_tables(pool.map(read, index.shards))
    names, speaker = _numbered(clips["speaker"])
    low, high, voiced = (clips[name].to_numpy() for name in _PITCH[1:4])
    weight = np.where(low > 0, voiced * clips["num_samples"].to_numpy(), 0.0)
    middle = np.log(np.where(low > 0, low * high, 1.0)) / 2
    total = np.bincount(speaker, weight, len(names))
    with np.errstate(invalid="ignore"):
        pitch = np.exp(np.bincount(speaker, weight * middle, len(names)) / total)
    return {name: float(hz) for name, hz, w in zip(names, pitch, total, strict=True) if w > 0}


def _refuse_filled_f0(folder: Folder, info: dict[str, Any]) -> None:
    if info["settings"].get("f0.interpolate"):
        raise UserError(
            f"{folder.name} has f0 without gaps (f0.interpolate=true), which does not say where "
            f"nothing is voiced; `extract --from {folder.name} NEW f0.interpolate=false` makes a "
            f"dataset that does"
        )


def _shards_of_split(folder: Folder, split: str) -> list[str]:
    names = folder.shards()
    chosen = [name for name in names if split_of(Path(name)) == split]
    if not names:
        raise UserError(f"{folder.name} has no shards yet; run `extract` first")
    if not chosen:
        have = ", ".join(sorted({split_of(Path(name)) for name in names}))
        raise UserError(f"{folder.name} has no split '{split}'; data.split can be {have}")
    return chosen


@dataclass(frozen=True)
class _Shard:
    """A footer, and the clips that are long enough, with their place in columns group and row."""

    name: str
    footer: Footer
    groups: int
    clips: pa.Table
    too_short: int


def _read_shard(folder: Folder, name: str, min_frames: int) -> _Shard:
    with folder.open_shard(name) as file:
        metadata = file.metadata.metadata or {}
        if b"cantor" not in metadata:
            raise UserError(
                f"{folder.where(name)} has no 'cantor' metadata: it is not a shard of this "
                f"program; take it out of the folder"
            )
        footer = Footer.from_json(metadata[b"cantor"].decode())
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        clips = file.read(columns=list(_NARROW), use_threads=False)
    group = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    row = np.concatenate([np.arange(size, dtype=np.int32) for size in [0, *sizes]])
    clips = clips.append_column("group", pa.array(group)).append_column("row", pa.array(row))
    enough = pc.greater_equal(clips["num_samples"], max(1, min_frames) * footer.hop_length)
    kept = clips.filter(enough)
    return _Shard(name, footer, len(sizes), kept, len(clips) - len(kept))


def _agreed(folder: Folder, shards: Sequence[_Shard]) -> Footer:
    """The first footer, which all others must agree with."""
    first = shards[0]
    for shard in shards[1:]:
        for name in ("sample_rate", "hop_length", "encoders", "f0_method", "fingerprint"):
            ours, theirs = (getattr(each.footer, name) for each in (first, shard))
            if ours != theirs:
                raise UserError(
                    f"{folder.where(shard.name)} does not belong to {first.name}: its {name} is "
                    f"{_in_words(theirs)}, not {_in_words(ours)}; keep the shards of one "
                    f"extraction in a folder"
                )
    return first.footer


def _in_words(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(f"{e.name} ({e.dim} {e.dtype}, {e.checkpoint_sha256})" for e in value)
    return str(value)


def _encoder(folder: Folder, footer: Footer, name: str | None) -> EncoderIdentity:
    by_name = {encoder.name: encoder for encoder in footer.encoders}
    if name is None and len(by_name) != 1:
        raise UserError(
            f"{folder.name} has units of {', '.join(by_name)}; choose one with data.encoder"
        )
    wanted = name or next(iter(by_name))
    if wanted not in by_name:
        raise UserError(
            f"{folder.name} has no units of '{wanted}'; data.encoder can be {', '.join(by_name)}"
        )
    if by_name[wanted].dtype != "float16":
        raise UserError(
            f"the units of '{wanted}' in {folder.name} are ids of a codebook "
            f"({by_name[wanted].dtype}); `extract --from {folder.name} NEW` without a codebook "
            f"makes a dataset that can be trained from"
        )
    return by_name[wanted]


def _numbered(column: pa.ChunkedArray) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """The different values of a column, sorted, and the place of each cell among them."""
    encoded = column.dictionary_encode().combine_chunks()
    values = np.array(encoded.dictionary.to_pylist(), dtype=object)
    order = np.argsort(values)
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order))
    return tuple(values[order]), place[encoded.indices.to_numpy()]
