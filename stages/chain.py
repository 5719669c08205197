"""The chain of stages that one song passes; extraction, re-extraction and conversion call it.

    decode + resample -> slice -> loudness -> quantise -> FLAC, quality

f0 (`stages.f0`), units (`stages.units`) and quality read the quantised samples, so extraction,
re-extraction from shards and conversion agree exactly.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from stages.decode import DecodeConfig, Decoded, Decoder, Header
from stages.errors import Dropped, Reason
from stages.f0.config import F0Config
from stages.flac import encode_flac
from stages.loudness import LoudnessConfig, LoudnessReading, apply_gain, measure_loudness
from stages.pcm import Subtype, dequantise, quantise
from stages.quality import QualityConfig, measure_quality, unwanted
from stages.resample import ResampleConfig
from stages.slice import (
    BLOCK_SAMPLES,
    SliceConfig,
    Span,
    frame_ms,
    is_silent,
    kept_spans,
    loudest_frame_db,
    slice_silence,
)
from stages.types import Array, blocks

_CANCELLED = 0.25  # of the peak that a channel alone would have in the mix
_DIGITAL_SILENCE_DB = -120.0


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """Sample format of the clips: rate in Hz, integer subtype."""

    sample_rate: int = 44100
    subtype: Subtype = "PCM_16"

    def __post_init__(self) -> None:
        if not 8000 <= self.sample_rate <= 192000:
            raise ValueError(
                f"audio.sample_rate is {self.sample_rate}; it must lie in 8000 to 192000 Hz"
            )


@dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """Settings of every stage up to the units. Two runs with equal settings make equal clips."""

    audio: AudioConfig = field(default_factory=AudioConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    resample: ResampleConfig = field(default_factory=ResampleConfig)
    slice: SliceConfig = field(default_factory=SliceConfig)
    loudness: LoudnessConfig = field(default_factory=LoudnessConfig)
    f0: F0Config = field(default_factory=F0Config)
    quality: QualityConfig = field(default_factory=QualityConfig)


@dataclass(frozen=True)
class Clip:
    """A stretch of a song between silences; one training example."""

    span: Span
    flac: bytes  # the T samples, gain applied, as integers of `audio.subtype`
    reading: LoudnessReading
    quality: dict[str, float]  # measures of its audio by name


class StageClock:
    """Wall-clock seconds spent in each stage, for the summary of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


@dataclass(frozen=True)
class PreparedSong:
    """All clips of one song, in order, and what was dropped from it."""

    clips: list[Clip]
    header: Header
    num_samples: int  # of the resampled song
    sample_rate: int
    dropped: list[Dropped]
    note: str = ""  # what is odd about it, although it can be used
    silence: str = ""  # the cause, where all of it is silent

    @property
    def duration_s(self) -> float:
        return self.num_samples / self.sample_rate

    def why_empty(self) -> tuple[str, str]:
        """Return the main reason why a readable song has no clips, and a message."""
        return why_empty(self.dropped, self.duration_s, self.silence)


def why_empty(dropped: Sequence[Dropped], duration_s: float, silence: str = "") -> tuple[str, str]:
    """Return the main reason why a song with these drops has no clips, and a message.

    silence: the result of `why_silent`.
    """
    others = [drop for drop in dropped if drop.reason != Reason.SILENCE]
    if not dropped:
        return Reason.TOO_SHORT, "the song has no samples"
    if not others:
        cause = f": {silence}" if silence else ""
        return Reason.SILENT, f"all {duration_s:.2f} s are below the silence threshold{cause}"
    main = max(others, key=lambda drop: (drop.seconds, drop.reason))
    parts = ", ".join(f"{drop.reason} {drop.seconds:.2f} s" for drop in dropped)
    return main.reason, f"none of its {duration_s:.2f} s is kept ({parts})"


def prepare_song(
    path: bytes, decoder: Decoder, cfg: ChainConfig, clock: StageClock
) -> PreparedSong:
    """Decode the audio file at `path` and cut it into clips, in order.

    A song of which nothing is kept has no clips; `dropped` says why.

    Raises: BadInput: when the file is broken; OSError: when the storage fails.
    """
    rate = cfg.audio.sample_rate
    with clock.stage("decode"):
        decoded = decoder.decode(path, rate, cfg.resample)
    with decoded:
        song = decoded.wav
        with clock.stage("slice"):
            kept, dropped = kept_spans(slice_silence(song, rate, cfg.slice), rate, cfg.slice)
        left_out: list[tuple[Span, str]] = [*dropped]
        reading = None
        if cfg.loudness.per == "song" and kept:
            with clock.stage("loudness"):
                reading = measure_loudness(song, rate, cfg.loudness)
        clips = []
        for span in kept:
            piece = song[span.start : span.stop]
            if is_silent(piece, rate, cfg.slice):
                left_out.append((span, Reason.SILENCE))
                continue
            clip = _prepare_clip(piece, span, reading, cfg, clock)
            reason = unwanted(clip.quality, cfg.quality)
            if reason is None:
                clips.append(clip)
            else:
                left_out.append((span, reason))
        reading_note = clips[0].reading.note if clips else ""
        note = "; ".join([*decoded.notes, *([reading_note] if reading_note else [])])
        tally = _tally(left_out, rate)
        silence = ""
        if {drop.reason for drop in tally} == {Reason.SILENCE} and not clips:
            silence = why_silent(decoded, rate, cfg.slice, cfg.decode)
        return PreparedSong(clips, decoded.header, len(song), rate, tally, note, silence)


def why_silent(decoded: Decoded, rate: int, cfg: SliceConfig, decode: DecodeConfig) -> str:
    """Return the cause of the silence of a song of which no frame reaches the threshold.

    rate: of the decoded samples, in Hz.
    """
    wav, count = decoded.wav, decoded.header.channels
    peak = max(
        (float(np.abs(wav[start:stop]).max()) for start, stop in blocks(wav, BLOCK_SAMPLES)),
        default=0.0,
    )
    # A channel alone keeps 1 / count of its peak in the mean, and resampling some of that.
    alone = decoded.channels_peak / (count if decode.channels == "mean" else 1)
    audible = decoded.channels_peak > 10 ** (cfg.threshold_db / 20)
    if count > 1 and audible and peak < _CANCELLED * alone:
        if decode.channels == "mean":
            return (
                f"its {count} channels cancel each other; decode.channels=first reads one of them"
            )
        return f"its first of {count} channels is silent; decode.channels=mean mixes all of them"
    level = loudest_frame_db(wav, rate, cfg)
    if level < _DIGITAL_SILENCE_DB:
        return "it is digital silence"
    return (
        f"its loudest {frame_ms(rate, cfg)} ms are at {level:.1f} dB, and slice.threshold_db is "
        f"{cfg.threshold_db:g}"
    )


def _prepare_clip(
    piece: Array, span: Span, reading: LoudnessReading | None, cfg: ChainConfig, clock: StageClock
) -> Clip:
    rate = cfg.audio.sample_rate
    with clock.stage("loudness"):
        reading = reading or measure_loudness(piece, rate, cfg.loudness)
        samples = quantise(apply_gain(piece, reading.gain_db), cfg.audio.subtype)
    wav = dequantise(samples, cfg.audio.subtype)
    with clock.stage("flac"):
        flac = encode_flac(samples, rate, cfg.audio.subtype)
    with clock.stage("quality"):
        quality = measure_quality(wav, rate)
    return Clip(span, flac, reading, quality)


def _tally(left_out: Sequence[tuple[Span, str]], sample_rate: int) -> list[Dropped]:
    clips: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    for span, reason in left_out:
        clips[reason] += 1
        samples[reason] += span.stop - span.start
    return [Dropped(r, clips[r], samples[r] / sample_rate) for r in sorted(clips)]
