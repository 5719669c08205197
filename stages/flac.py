"""FLAC encoding and decoding of a clip's samples.

Tested by tests/stages/test_chain.py.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from stages.pcm import Subtype

# Level 0.5 of libsndfile: 9 % smaller than level 0 for a fifth more time; 1.0 doubles the time.
_COMPRESSION_LEVEL = 0.5


def encode_flac(samples: NDArray[np.integer[Any]], sample_rate: int, subtype: Subtype) -> bytes:
    """Encode samples (T,): int16, or 24-bit values in int32, as `stages.pcm.quantise` returns."""
    buffer = io.BytesIO()
    if subtype == "PCM_24":
        samples = samples.astype(np.int32) << 8  # libsndfile keeps the upper 24 of 32 bits
    with sf.SoundFile(
        buffer, "w", sample_rate, 1, subtype, format="FLAC", compression_level=_COMPRESSION_LEVEL
    ) as file:
        file.write(samples)
    return buffer.getvalue()


def decode_flac(data: bytes, subtype: Subtype) -> NDArray[np.integer[Any]]:
    """Decode to (T,) integers, exactly those given to `encode_flac`.

    Raises: LibsndfileError: when the bytes are damaged (soundfile's exception).
    """
    dtype = "int16" if subtype == "PCM_16" else "int32"
    samples: NDArray[np.integer[Any]] = sf.read(io.BytesIO(data), dtype=dtype)[0]
    return samples >> 8 if subtype == "PCM_24" else samples
