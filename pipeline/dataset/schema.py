"""The shard format: its versions, columns and identities. docs/shards.md specifies it.

Tested by tests/pipeline/dataset/test_shards.py, tests/pipeline/dataset/test_shards_doc.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stages.quality import AUDIO_MEASURES, MEASURES, PITCH_MEASURES, Measure

# A measure that is added or changed raises the version; so does any other change, by this number.
_LAYOUT_VERSION = 2
SCHEMA_VERSION = max(_LAYOUT_VERSION, *(measure.changed or measure.since for measure in MEASURES))

# Datasets from this version on are read, verified and resumed as they are. Older ones are opened
# by `report`, and by `extract --from`, which makes a dataset of the present version.
OLDEST_SUPPORTED = 2


XVECTOR_COLUMN = "xvector"


def _columns(measures: Sequence[Measure[Any]], version: int) -> tuple[str, ...]:
    return tuple(each.name for each in measures if each.stored and each.since <= version)


def audio_columns(version: int) -> tuple[str, ...]:
    """Return the measures of audio in shards of a schema version."""
    return _columns(AUDIO_MEASURES, version)


def pitch_columns(version: int) -> tuple[str, ...]:
    """Return the measures of pitch in shards of a schema version."""
    return _columns(PITCH_MEASURES, version)


def pitch_revisions(version: int) -> dict[str, int]:
    """Return the measures of pitch in shards of a schema version, each with its revision."""
    names = pitch_columns(version)
    return {each.name: each.revision(version) for each in PITCH_MEASURES if each.name in names}


def quality_columns(version: int) -> tuple[str, ...]:
    """Return all measures in shards of a schema version."""
    return audio_columns(version) + pitch_columns(version)


AUDIO_COLUMNS = audio_columns(SCHEMA_VERSION)


QUALITY_COLUMNS = quality_columns(SCHEMA_VERSION)


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


_LEVELS = [(name, pa.float32()) for name in ("loudness_lufs", "gain_db", "peak_db")]


def _floats(names: Sequence[str]) -> list[tuple[str, pa.DataType]]:
    return [(name, pa.float32()) for name in names]


# Columns of a clip before its pitch is known, and those that the pitch adds; in shards, units come
# between f0 and the measures.
AUDIO_SCHEMA = pa.schema(_IDENTITY + _LEVELS + _floats(AUDIO_COLUMNS))


PITCH_SCHEMA = pa.schema(_F0 + _floats(pitch_columns(SCHEMA_VERSION)))


@dataclass(frozen=True)
class EncoderIdentity:
    """Facts about the units in a column that a trainer needs.

    For ids (one number a frame, that of the nearest of `codebook_size` centres) dtype is int16 and
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
    """Facts about the speaker embeddings in the column `xvector` that a trainer needs."""

    dim: int
    checkpoint_sha256: str


def clip_name(song_id: str, number: int) -> str:
    """Return the id of a song's clip; numbers begin at 0."""
    return f"{song_id}#{number:06d}"


def shard_schema(
    encoders: Sequence[EncoderIdentity],
    sample_rate: int,
    xvector: XvectorIdentity | None = None,
    version: int = SCHEMA_VERSION,
) -> pa.Schema:
    """Return the Arrow schema of a shard, with the Hugging Face features in its metadata.

    version: `OLDEST_SUPPORTED` or later.
    """
    columns = [*_IDENTITY, *_F0]
    for encoder in encoders:
        columns += [(encoder.column, pa.binary()), (encoder.frames_column, pa.int32())]
    if xvector is not None:
        columns.append((XVECTOR_COLUMN, pa.list_(pa.float32())))
    schema = pa.schema(columns + _LEVELS + _floats(quality_columns(version)))
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
