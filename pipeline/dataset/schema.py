"""The shard format: its version, columns and identities. docs/shards.md specifies it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa

from stages.pitch_quality import PitchQuality
from stages.quality import Quality

SCHEMA_VERSION = 2


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
