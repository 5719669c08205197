"""Quantisation to a PCM subtype and back. All later stages read the quantised samples."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stages.types import Array

Subtype = Literal["PCM_16", "PCM_24"]
_BITS: dict[Subtype, int] = {"PCM_16": 16, "PCM_24": 24}
_DTYPE: dict[Subtype, type[np.signedinteger[Any]]] = {"PCM_16": np.int16, "PCM_24": np.int32}


def quantise(wav: Array, subtype: Subtype) -> NDArray[np.integer[Any]]:
    """Quantise float32 (T,) to int16, or 24-bit values in int32: x * 2^(bits-1), half to even.

    Values outside [-1, 1) are clipped.

    Raises: FloatingPointError: when a sample is NaN.
    """
    scale = np.float32(1 << (_BITS[subtype] - 1))
    steps = np.clip(np.rint(wav * scale), -scale, scale - 1)
    with np.errstate(invalid="raise"):
        samples: NDArray[np.integer[Any]] = steps.astype(_DTYPE[subtype])
    return samples


def dequantise(samples: NDArray[np.integer[Any]], subtype: Subtype) -> Array:
    """Convert integers (T,) of `subtype` to float32 in [-1, 1), exactly; `quantise` inverts it."""
    return samples.astype(np.float32) / np.float32(1 << (_BITS[subtype] - 1))
