"""Slicing of a song at its silences, and of spans that are longer than a clip may be.

The silences are those of openvpi/audio-slicer and so-vits-svc, sample for sample, from the RMS of
frames of 4 hops. Added are forced cuts of long spans, and memory that does not grow with the song.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.errors import Reason
from stages.types import Samples

BLOCK_SAMPLES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class SliceConfig:
    """Settings of the slicer. Durations in milliseconds, the threshold in dBFS of a frame's RMS.

    The first five and their defaults are audio-slicer's. `max_length_ms` None leaves long spans
    whole, as audio-slicer does. `min_kept_ms` is the length that `kept_spans` requires of a clip.
    """

    threshold_db: float = -40.0
    min_length_ms: int = 5000
    min_interval_ms: int = 300
    hop_ms: int = 20
    max_silence_kept_ms: int = 5000
    max_length_ms: int | None = 15000
    min_kept_ms: int = 500

    def __post_init__(self) -> None:
        if not np.isfinite(self.threshold_db):
            raise ValueError(f"slice.threshold_db is {self.threshold_db}; it must be finite")
        if not self.min_length_ms >= self.min_interval_ms >= self.hop_ms >= 1:
            raise ValueError(
                "slice.min_length_ms >= slice.min_interval_ms >= slice.hop_ms >= 1 is required; "
                f"they are {self.min_length_ms}, {self.min_interval_ms} and {self.hop_ms}"
            )
        if self.max_silence_kept_ms < self.hop_ms:
            raise ValueError(
                f"slice.max_silence_kept_ms is {self.max_silence_kept_ms}; it must be at least "
                f"slice.hop_ms ({self.hop_ms})"
            )
        if self.min_kept_ms < 0:
            raise ValueError(f"slice.min_kept_ms is {self.min_kept_ms}; it must not be negative")
        if self.max_length_ms is not None and self.max_length_ms < max(1, self.min_kept_ms):
            raise ValueError(
                f"slice.max_length_ms is {self.max_length_ms}; it must be at least 1 and at least "
                f"slice.min_kept_ms ({self.min_kept_ms}), or no clip would be kept"
            )


class Span(NamedTuple):
    """Samples [start, stop) of a song."""

    start: int
    stop: int
    silent: bool


class _Frames(NamedTuple):
    """`SliceConfig` at one sample rate: samples for the first two, frames for the rest."""

    hop_length: int
    win_length: int
    min_length: int
    min_interval: int
    max_silence_kept: int


def slice_silence(wav: Samples, sample_rate: int, cfg: SliceConfig) -> list[Span]:
    """Slice `wav` (T,) into spans that cover it in order, without gap or overlap.

    A cut without removal is a silent span of length zero. With `max_length_ms=None` the spans
    equal those of so-vits-svc's `Slicer.slice` on the same mono samples, its quirks included
    (tests/golden/preprocessing). Two-dimensional input is not supported (the original mixes up
    channels and samples there). Otherwise sounding spans longer than `max_length_ms` are cut at
    quiet frames. Their pieces are at most that long and, where possible, at least a third of it and
    at least `min_kept_ms`. An empty song is one sounding span of length zero.

    Source: openvpi/audio-slicer, class Slicer; so-vits-svc, inference/slicer.py.
    """
    frames = _frames(sample_rate, cfg)
    rms = rms_frames(wav, sample_rate, cfg)
    # The original compares samples with frames here; the same is done for equal cuts.
    whole = len(wav) <= frames.min_length
    silences = [] if whole else _silences(rms, cfg.threshold_db, frames)
    spans = _cover(silences, len(wav), frames.hop_length)
    if cfg.max_length_ms is None:
        return spans
    longest = max(1, sample_rate * cfg.max_length_ms // 1000)
    shortest = -(-sample_rate * cfg.min_kept_ms // 1000)
    pieces: list[Span] = []
    for span in spans:
        if span.silent:
            pieces.append(span)
        else:
            pieces.extend(_cut_long(span, rms, frames.hop_length, longest, shortest))
    return pieces


def kept_spans(
    spans: list[Span], sample_rate: int, cfg: SliceConfig
) -> tuple[list[Span], list[tuple[Span, Reason]]]:
    """Split spans into those that become clips and those dropped as SILENCE or TOO_SHORT.

    Spans of length zero are in neither list.
    """
    kept, dropped = [], []
    for span in spans:
        length = span.stop - span.start
        if length == 0:
            continue
        if span.silent:
            dropped.append((span, Reason.SILENCE))
        elif 1000 * length < cfg.min_kept_ms * sample_rate:
            dropped.append((span, Reason.TOO_SHORT))
        else:
            kept.append(span)
    return kept, dropped


def is_silent(wav: Samples, sample_rate: int, cfg: SliceConfig) -> bool:
    """Check that no frame of `wav` reaches the threshold, ignoring a constant offset.

    `slice_silence` returns a silent song shorter than `max_silence_kept_ms` as one sounding span,
    because it keeps that much silence beside every cut.
    """
    threshold = 10 ** (cfg.threshold_db / 20)
    return all(level < threshold for level in _loudest_frames(wav, sample_rate, cfg))


def loudest_frame_db(wav: Samples, sample_rate: int, cfg: SliceConfig) -> float:
    """Return the level in dBFS that `is_silent` compares with the threshold; -inf for zeros."""
    loudest = max(_loudest_frames(wav, sample_rate, cfg), default=0.0)
    return 20 * math.log10(loudest) if loudest > 0 else -math.inf


def frame_ms(sample_rate: int, cfg: SliceConfig) -> int:
    """Return the length of a frame, rounded to milliseconds."""
    return round(1000 * _frames(sample_rate, cfg).win_length / sample_rate)


def _loudest_frames(wav: Samples, sample_rate: int, cfg: SliceConfig) -> Iterator[float]:
    """Yield the highest RMS of each second, without its mean."""
    for start in range(0, len(wav), sample_rate):
        second = wav[start : start + sample_rate]
        yield float(rms_frames(second - second.mean(), sample_rate, cfg).max(initial=0.0))


def rms_frames(
    wav: Samples, sample_rate: int, cfg: SliceConfig, *, block_samples: int = BLOCK_SAMPLES
) -> NDArray[np.float64]:
    """Compute the RMS (F,) of frames centred at multiples of the hop, zeros around the song.

    The frames of `librosa.feature.rms(center=True, pad_mode="constant")` in float64. Reads `wav` in
    blocks of about `block_samples`. The result is bit-identical for every block size, because
    squares are summed in cells of one hop that start at the same samples in every block.
    """
    frames = _frames(sample_rate, cfg)
    hop, win = frames.hop_length, frames.win_length
    lead = win // 2  # zeros before the song
    count = max(0, 1 + (len(wav) + 2 * lead - win) // hop)
    whole, rest = divmod(win, hop)  # a frame is `whole` cells and the head of one more
    num_cells = count + whole
    cells = np.zeros(num_cells)
    heads = np.zeros(num_cells)
    cells_a_block = max(1, block_samples // hop)
    for first in range(0, num_cells, cells_a_block):
        last = min(first + cells_a_block, num_cells)
        squares = np.zeros((last - first, hop))
        start = first * hop - lead
        block = wav[max(0, start) : max(0, last * hop - lead)].astype(np.float64)
        offset = max(0, -start)
        np.square(block, out=squares.reshape(-1)[offset : offset + len(block)])
        cells[first:last] = squares.sum(axis=1)
        heads[first:last] = squares[:, :rest].sum(axis=1)
    power = heads[whole : whole + count].copy()
    for k in range(whole):
        power += cells[k : k + count]
    return np.sqrt(power / win)


def _frames(sample_rate: int, cfg: SliceConfig) -> _Frames:
    hop_length = max(1, round(sample_rate * cfg.hop_ms / 1000))
    interval = sample_rate * cfg.min_interval_ms / 1000
    return _Frames(
        hop_length=hop_length,
        win_length=max(1, min(round(interval), 4 * hop_length)),
        min_length=round(sample_rate * cfg.min_length_ms / 1000 / hop_length),
        min_interval=round(interval / hop_length),
        max_silence_kept=round(sample_rate * cfg.max_silence_kept_ms / 1000 / hop_length),
    )


def _silences(
    rms: NDArray[np.float64], threshold_db: float, frames: _Frames
) -> list[tuple[int, int]]:
    """Find the silences to remove, in order: (first, last) frame; equal for a bare cut."""
    keep = frames.max_silence_kept
    silences: list[tuple[int, int]] = []
    clip_start = 0
    for first, stop in _runs_below(rms, 10 ** (threshold_db / 20)):
        if stop == len(rms):
            if stop - first >= frames.min_interval:
                # One past the last frame, so that the silence reaches the end of the song.
                silences.append((_quietest(rms, first, first + keep), stop + 1))
            continue
        length = stop - first
        long_enough = length >= frames.min_interval and stop - clip_start >= frames.min_length
        if not long_enough and not (first == 0 and stop > keep):
            continue
        if length <= keep:
            left = right = _quietest(rms, first, stop)
        else:
            # The original also searches between these two, without effect.
            left = _quietest(rms, first, first + keep)
            right = _quietest(rms, stop - keep, stop)
        silences.append((0 if first == 0 else left, right))
        clip_start = right
    return silences


def _runs_below(rms: NDArray[np.float64], threshold: float) -> list[tuple[int, int]]:
    """Return the runs [first, stop) of frames below the threshold."""
    below = np.zeros(len(rms) + 2, dtype=np.int8)
    below[1:-1] = rms < threshold
    edges = np.diff(below)
    firsts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return list(zip(firsts.tolist(), stops.tolist(), strict=True))


def _quietest(rms: NDArray[np.float64], first: int, last: int) -> int:
    """Return the index of the quietest frame from first to last inclusive; the first of a tie."""
    return first + int(rms[first : last + 1].argmin())


def _cover(silences: list[tuple[int, int]], num_samples: int, hop_length: int) -> list[Span]:
    """Convert silences in frames to spans in samples that cover the song."""
    spans: list[Span] = []
    position = 0
    for first, last in silences:
        start, stop = min(num_samples, first * hop_length), min(num_samples, last * hop_length)
        if first > 0:
            spans.append(Span(position, start, False))
        spans.append(Span(start, stop, True))
        position = stop
    if position < num_samples or not spans:
        spans.append(Span(position, num_samples, False))
    return spans


def _cut_long(
    span: Span, rms: NDArray[np.float64], hop_length: int, longest: int, shortest: int
) -> list[Span]:
    """Cut a sounding span at quiet frames into pieces of at most `longest` samples.

    Each cut is the quietest frame that leaves at least `floor` samples before it and a rest that
    can again be cut into pieces of `floor` to `longest`. Where no frame does (a window of less than
    a hop, or `shortest` above half of `longest`), the rest is cut into equal parts.
    """
    floor = max(1, shortest, longest // 3)
    start, stop, _ = span
    pieces: list[Span] = []
    while stop - start > longest:
        first = -(-(start + floor) // hop_length)
        last = min(start + longest, stop - floor) // hop_length
        frames = np.arange(first, min(last + 1, len(rms)))
        rest = stop - frames * hop_length
        frames = frames[-(-rest // longest) * floor <= rest]
        if len(frames):
            cut = int(frames[rms[frames].argmin()]) * hop_length
        else:
            num_pieces = -(-(stop - start) // longest)
            cut = start - (start - stop) // num_pieces
        pieces.append(Span(start, cut, False))
        start = cut
    return [*pieces, Span(start, stop, False)]
