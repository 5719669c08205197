"""The interface of encoders: waveforms to sequences of units.

Tested by tests/models/encoders/test_encoders.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

DType = Literal["float32", "float16", "bfloat16"]  # precision of a network


class Encoder(Protocol):
    """Encoder of speech or singing to units, D values per frame.

    Frame i starts at sample i * hop_length. The number of frames and the reach of a frame depend on
    the encoder; its docstring states them. Every clip of one sample or more has at least one frame.
    """

    @property
    def name(self) -> str: ...
    @property
    def sample_rate(self) -> int: ...
    @property
    def hop_length(self) -> int:
        """Samples at `sample_rate` between frames."""
        ...

    @property
    def dim(self) -> int:
        """D, the width of a frame."""
        ...

    def encode(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Encode clips: (T,) float32 at `sample_rate`, on any device -> float32 CPU (F, D).

        Exact: the units of a clip depend on that clip only, never on the others in the call. The
        caller passes all clips that it has, and an encoder that batches plans its batches itself
        (clips sorted by length, padding masked, a batch that does not fit in memory split).

        Raises: ValueError: when `check_clips` refuses a clip.
        """
        ...


def check_clips(wavs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return `wavs` unchanged if all are float32 (T,), not empty and finite.

    Raises: ValueError: when a clip is not.
    """
    for i, wav in enumerate(wavs):
        if wav.ndim != 1 or wav.dtype != torch.float32:
            raise ValueError(
                f"clip {i} is {tuple(wav.shape)} {wav.dtype}; an encoder needs (T,) float32"
            )
        if len(wav) == 0:
            raise ValueError(f"clip {i} has no samples")
        if not torch.isfinite(wav).all():
            raise ValueError(f"clip {i} has NaN or infinite samples")
    return wavs
