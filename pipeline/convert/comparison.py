"""Comparison of a converted song with its source, both read back from their files.

Whole songs are measured, in blocks. Of a long song a part is played and a part drawn.
Tested by tests/pipeline/convert/test_page.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf

from pipeline.convert.metrics import (
    F0Agreement,
    compare_f0,
    envelope_distance,
    long_term_envelope,
    measure_f0,
)
from pipeline.convert.result import Conversion
from pipeline.reports.mel_picture import mel_power
from stages.decode import Decoder
from stages.flac import encode_flac
from stages.loudness import integrated_loudness
from stages.pcm import quantise
from stages.resample import ResampleConfig
from stages.types import Array, Samples

_DRAWN_S = 60.0  # at most; in a longer picture vibrato is narrower than a pixel
_DRAWN_COLUMNS = 1600
_FULL_SCALE = 1 - 2**-15  # the largest sample of 16 bits
_READ_SAMPLES = 65536
_ENVELOPE_RATE = 16000  # Hz; lower rates have no long-term envelope


@dataclass(frozen=True)
class Sound:
    """A song before or after conversion, mono and at the voice's rate."""

    played: bytes  # FLAC of its beginning
    power: Array  # (M, columns) mel power of the part that is drawn
    loudness_lufs: float


@dataclass(frozen=True)
class DrawnPart:
    """The part of a song that is drawn. column_s: duration of a column of the spectrograms."""

    first_frame: int
    frames: int
    column_s: float


@dataclass(frozen=True)
class ComparedSong:
    """A conversion and the measures of its files."""

    conversion: Conversion
    seconds: float
    played_s: float
    before: Sound
    after: Sound
    drawn: DrawnPart
    output_f0: Array  # (F,) Hz measured in the output
    f0_agreement: F0Agreement  # of target and output
    envelope_db: float  # distance of the long-term envelopes
    full_scale: int  # samples of the output at full scale, all channels

    @property
    def real_time_factor(self) -> float:
        return self.conversion.wall_s / self.seconds

    @property
    def peak_db(self) -> float:
        peak = self.conversion.peak
        return 20 * math.log10(peak) if peak > 0 else -math.inf

    @property
    def drawn_s(self) -> tuple[float, float]:
        """Start and end of the part that is drawn, in seconds."""
        frame_s = self.conversion.hop_length / self.conversion.sample_rate
        first, last = self.drawn.first_frame, self.drawn.first_frame + self.drawn.frames
        return first * frame_s, last * frame_s

    @property
    def is_drawn_in_part(self) -> bool:
        frame_s = self.conversion.hop_length / self.conversion.sample_rate
        return self.drawn.frames * frame_s < self.played_s - frame_s


def compare_song(
    conversion: Conversion, decoder: Decoder, resample: ResampleConfig, most_played_s: float
) -> ComparedSong:
    """Read and measure a song and its conversion.

    Raises: BadInput: when a file cannot be decoded; LibsndfileError: when the output is gone.
    """
    rate, hop = conversion.sample_rate, conversion.hop_length
    target = conversion.target_f0
    with (
        decoder.decode(conversion.source, rate, resample) as source,
        decoder.decode(conversion.output, rate, resample) as output,
    ):
        before, after = source.wav, output.wav
        played = min(len(before), round(most_played_s * rate))
        drawn = _choose_drawn(target[: played // hop], played, rate, hop)
        output_f0 = measure_f0(after, rate, hop, len(target), float(target.max(initial=0.0)))
        return ComparedSong(
            conversion=conversion,
            seconds=len(before) / rate,
            played_s=played / rate,
            before=_sound(before, played, drawn, conversion),
            after=_sound(after, played, drawn, conversion),
            drawn=drawn,
            output_f0=output_f0,
            f0_agreement=compare_f0(target, output_f0),
            envelope_db=_envelope_distance(before[:played], after[:played], rate),
            full_scale=_count_full_scale(conversion.output),
        )


def _choose_drawn(f0: Array, played: int, sample_rate: int, hop_length: int) -> DrawnPart:
    """Return the minute of `f0` (F,) with most voiced frames. played: samples."""
    frames = min(math.ceil(played / hop_length), round(_DRAWN_S * sample_rate / hop_length))
    voiced = np.concatenate([[0], np.cumsum(f0 > 0)])
    first = 0
    if frames < len(voiced):
        first = int(np.argmax(voiced[frames:] - voiced[: len(voiced) - frames]))
    group = max(1, math.ceil(frames / _DRAWN_COLUMNS))
    return DrawnPart(first, frames, group * hop_length / sample_rate)


def _sound(wav: Samples, played: int, drawn: DrawnPart, conversion: Conversion) -> Sound:
    rate, hop = conversion.sample_rate, conversion.hop_length
    beginning = wav[:played]
    piece = beginning[drawn.first_frame * hop : (drawn.first_frame + drawn.frames) * hop]
    piece = np.pad(piece, (0, drawn.frames * hop - len(piece)))
    power = mel_power(piece, rate, hop)[:, : drawn.frames]
    group = round(drawn.column_s * rate / hop)
    starts = np.arange(0, power.shape[1], group)
    columns = np.add.reduceat(power, starts, axis=1) / np.diff([*starts, power.shape[1]])
    return Sound(
        played=encode_flac(quantise(beginning, "PCM_16"), rate, "PCM_16"),
        power=columns.astype(np.float32),
        loudness_lufs=integrated_loudness(wav, rate),
    )


def _envelope_distance(before: Array, after: Array, sample_rate: int) -> float:
    """Return the distance in dB; NaN where there is nothing to compare."""
    if sample_rate < _ENVELOPE_RATE:
        return math.nan
    return envelope_distance(
        long_term_envelope(before, sample_rate), long_term_envelope(after, sample_rate)
    )


def _count_full_scale(output: Path) -> int:
    with sf.SoundFile(output) as file:
        blocks = file.blocks(_READ_SAMPLES, dtype="float32")
        return sum(int(np.count_nonzero(np.abs(block) >= _FULL_SCALE)) for block in blocks)
