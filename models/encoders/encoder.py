"""What every encoder is: waveform in, a sequence of units out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

DType = Literal["float32", "float16", "bfloat16"]  # what a network computes in


class Encoder(Protocol):
    """Turns speech or singing into units, D numbers a frame.

    Frame i starts at sample i * hop_length; how many frames a clip has, and how far one reaches,
    is the encoder's own rule, which its docstring states. Every clip of one sample or more has one.
    """

    @property
    def name(self) -> str: ...
    @property
    def sample_rate(self) -> int: ...
    @property
    def hop_length(self) -> int:
        """Samples at `sample_rate` from one frame to the next."""
        ...

    @property
    def dim(self) -> int:
        """D, the width of a frame."""
        ...

    def encode(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Units of each clip: (T,) float32 at `sample_rate`, on any device -> float32 CPU (F, D).

        Exact: a clip's numbers depend on that clip alone, never on the others in the call. An
        encoder that batches plans its batches in here (clips sorted by length, padding masked, a
        batch that does not fit in memory split), and the caller hands over all the clips it has.

        Raises ValueError for a clip that `checked` refuses.
        """
        ...


def checked(wavs: Sequence[Tensor]) -> Sequence[Tensor]:
    """`wavs`, if an encoder can take them: float32 (T,), not empty, finite; ValueError if not."""
    for i, wav in enumerate(wavs):
        if wav.ndim != 1 or wav.dtype != torch.float32:
            raise ValueError(
                f"clip {i} is {tuple(wav.shape)} {wav.dtype}; an encoder takes (T,) float32"
            )
        if len(wav) == 0:
            raise ValueError(f"clip {i} has no samples")
        if not torch.isfinite(wav).all():
            raise ValueError(f"clip {i} has NaN or infinite samples")
    return wavs
