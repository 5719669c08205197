"""crepe"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stages.f0.config import F0Config
from stages.frames import Track
from stages.types import Array


def crepe(wavs: Sequence[Array], sample_rate: int, cfg: F0Config) -> Iterable[Track]:
    """f0 in Hz and the samples that its values belong to, of each clip."""
    raise NotImplementedError


def crepe_tiny(wavs: Sequence[Array], sample_rate: int, cfg: F0Config) -> Iterable[Track]:
    """The same with the small network."""
    raise NotImplementedError
