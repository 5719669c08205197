"""What a converted song leaves for those who report of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages.types import Array


@dataclass(frozen=True)
class Conversion:
    """A song that was converted.

    sample_rate, hop_length: the voice's, in Hz and samples; its frame clock.
    num_samples: of the output, at its own rate.
    f0: (F,) Hz found in the song, 0 where unvoiced. f0_asked: (F,) what the voice was to sing.
    gain_db: brought the song to the level that the voice knows, and was undone in the output.
    peak: the largest magnitude of the output before it was written; above 1 it was clipped.
    wall_s, cpu_s: what the conversion took.
    """

    song_id: str
    source: Path
    output: Path
    sample_rate: int
    hop_length: int
    num_samples: int
    f0: Array
    f0_asked: Array
    notices: tuple[str, ...]
    pieces: int
    gain_db: float
    peak: float
    wall_s: float
    cpu_s: float

    @property
    def duration_s(self) -> float:
        """Of the song, in whole frames."""
        return len(self.f0) * self.hop_length / self.sample_rate
