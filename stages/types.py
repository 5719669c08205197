"""Array types shared by the stages.

Axis legend: T samples, F frames, D unit width.

Tested by tests/stages/test_loudness.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Samples(Protocol):
    """Mono float32 samples (T,) read by slicing: an array or a `PcmFile`."""

    def __len__(self) -> int: ...
    def __getitem__(self, span: slice, /) -> Array: ...


class PcmFile:
    """Mono float32 samples (T,) in a headerless little-endian file.

    Each slice is read into a new array, so a 10-hour song takes disk space and no memory.
    Contiguous slices only (`wav[start:stop]`).
    """

    def __init__(self, path: Path, num_samples: int) -> None:
        self.path = path
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, span: slice, /) -> Array:
        start, stop, step = span.indices(self.num_samples)
        if step != 1:
            raise ValueError("PcmFile reads contiguous slices only")
        count = max(0, stop - start)
        return np.fromfile(self.path, dtype="<f4", count=count, offset=4 * start)


def blocks(wav: Samples, block_samples: int) -> list[tuple[int, int]]:
    """Return spans [start, stop) that cover `wav` in order, each of at most `block_samples`."""
    return [(i, min(i + block_samples, len(wav))) for i in range(0, len(wav), block_samples)]
