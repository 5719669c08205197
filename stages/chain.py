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

from stages.decode import DecodeConfig, Decoder, Header
from stages.errors import Dropped, Reason
from stages.f0.config import F0Config
from stages.flac import encode_flac
from stages.loudness import LoudnessConfig, LoudnessReading, apply_gain, measure_loudness
from stages.pcm import Subtype, dequantise, quantise
from stages.quality import QualityConfig, measure_quality, unwanted
from stages.resample import ResampleConfig
from stages.slice import SliceConfig, Span, is_silent, kept_spans, slice_silence
from stages.types import Array


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
    note: str = ""

    @property
    def duration_s(self) -> float:
        return self.num_samples / self.sample_rate

    def why_empty(self) -> tuple[str, str]:
        """Return the main reason why a readable song has no clips, and a message."""
        return why_empty(self.dropped, self.duration_s)


def why_empty(dropped: Sequence[Dropped], duration_s: float) -> tuple[str, str]:
    """Return the main reason why a song with these drops has no clips, and a message."""
    others = [drop for drop in dropped if drop.reason != Reason.SILENCE]
    if not dropped:
        return Reason.TOO_SHORT, "the song has no samples"
    if not others:
        return Reason.SILENT, f"all {duration_s:.2f} s are below the silence threshold"
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
        note = clips[0].reading.note if clips else ""
        return PreparedSong(clips, decoded.header, len(song), rate, _tally(left_out, rate), note)


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
