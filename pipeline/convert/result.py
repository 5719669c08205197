"""The result of a converted song, for summaries and pages.

Tested by tests/pipeline/convert/test_command.py, tests/pipeline/convert/test_page.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages.types import Array


@dataclass(frozen=True)
class Conversion:
    """A converted song.

    sample_rate, hop_length: the voice's, in Hz and samples; its frame clock.
    num_samples: of the output, at its own rate.
    f0: (F,) Hz of the song, 0 where unvoiced. target_f0: (F,) Hz that the voice was to sing.
    gain_db: gain that brought the song to the voice's level; undone in the output.
    peak: the largest magnitude of the output before it was written; above 1 it was clipped.
    wall_s, cpu_s: time of the conversion.
    """

    song_id: str
    source: Path
    output: Path
    sample_rate: int
    hop_length: int
    num_samples: int
    f0: Array
    target_f0: Array
    notices: tuple[str, ...]
    pieces: int
    gain_db: float
    peak: float
    wall_s: float
    cpu_s: float

    @property
    def duration_s(self) -> float:
        """Length of the song in whole frames."""
        return len(self.f0) * self.hop_length / self.sample_rate
