"""Clips of a table, decoded to samples.

Tested by tests/pipeline/extract/test_pitch_columns.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import pyarrow as pa
import pyarrow.compute as pc

from stages.flac import decode_flac
from stages.pcm import Subtype, dequantise
from stages.types import Array


class DecodedClips(Sequence[Array]):
    """The clips of a column of FLAC, decoded one at a time as they are read."""

    def __init__(self, audio: pa.ChunkedArray, subtype: Subtype) -> None:
        self.flac = pc.struct_field(audio, "bytes")
        self.subtype = subtype

    def __len__(self) -> int:
        return len(self.flac)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Array]: ...
    def __getitem__(self, index: int | slice) -> Array | Sequence[Array]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return dequantise(decode_flac(self.flac[index].as_py(), self.subtype), self.subtype)
