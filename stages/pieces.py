"""Pieces of a song: planning, reading and cross-fading them into one song again.

A converter works on one piece at a time. Pieces lie on the frame clock of the whole song, so that
neighbours agree on the position of each frame. A piece is read with context on both sides and
cross-fades into its neighbour, or fades to silence, around their boundary. Memory does not grow
with the song.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.slice import Span
from stages.types import Array, Samples


@dataclass(frozen=True)
class Piece:
    """Frames [start, stop) of a song; `pad` more are read on either side.

    fade_in, fade_out: samples on each side of the first and the last boundary that the fade covers.
    joined: the previous piece ends where this one starts; else silence comes before it.
    """

    start: int
    stop: int
    pad: int
    fade_in: int
    fade_out: int
    joined: bool

    @property
    def read_start(self) -> int:
        """First frame read; may lie before the song."""
        return self.start - self.pad

    @property
    def read_stop(self) -> int:
        """One past the last frame read; may lie after the song."""
        return self.stop + self.pad

    @property
    def frames(self) -> int:
        """Number of frames read, padding included."""
        return self.read_stop - self.read_start


def plan_pieces(
    spans: Sequence[Span], num_samples: int, hop_length: int, pad_samples: int, fade_samples: int
) -> list[Piece]:
    """Plan the pieces of the sounding `spans`, in order.

    spans: from `stages.slice`; they cover the song. pad_samples: context on each side, rounded up
    to frames. fade_samples: length of a whole cross-fade; shorter where a piece or the silence next
    to it is shorter. There is no fade at the ends of the song.
    """
    end = -(-num_samples // hop_length)
    bounds: list[list[int]] = []
    for span in spans:
        start, stop = _nearest(span.start, hop_length), min(_nearest(span.stop, hop_length), end)
        if span.stop == num_samples:
            stop = end
        if not span.silent and stop > start:
            bounds.append([start, stop])
    pad = -(-max(pad_samples, fade_samples) // hop_length)
    pieces: list[Piece] = []
    for i, (start, stop) in enumerate(bounds):
        before = bounds[i - 1][1] if i else 0
        after = bounds[i + 1][0] if i + 1 < len(bounds) else end
        own = stop - start
        joined = i > 0 and before == start
        beside = (bounds[i - 1][1] - bounds[i - 1][0]) if joined else start - before
        joined_after = i + 1 < len(bounds) and after == stop
        beside_after = (bounds[i + 1][1] - bounds[i + 1][0]) if joined_after else after - stop
        pieces.append(
            Piece(
                start,
                stop,
                pad,
                _fade(fade_samples, own, beside, hop_length),
                _fade(fade_samples, own, beside_after, hop_length),
                joined,
            )
        )
    return pieces


def stretches(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Group pieces that follow each other without silence between them."""
    groups: list[list[Piece]] = []
    for piece in pieces:
        if piece.joined:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def read_frames(song: Samples, start: int, stop: int, hop_length: int) -> Array:
    """Read the samples of frames [start, stop), with zeros beyond the ends of the song."""
    first, last = start * hop_length, stop * hop_length
    inside = song[max(0, first) : max(0, min(last, len(song)))]
    wav = np.zeros(last - first, np.float32)
    wav[max(0, -first) :][: len(inside)] = inside
    return wav


class Joiner:
    """Joins the audio of pieces, given in order, into the audio of the song."""

    def __init__(self, hop_length: int) -> None:
        self.hop_length = hop_length
        self._written = 0  # samples
        self._tail = np.zeros(0, np.float32)  # around the end of the last piece, not faded yet
        self._fade = 0

    def add(self, piece: Piece, wav: Array) -> Array:
        """Return the next samples of the song. wav: the audio of all frames that `piece` reads."""
        hop = self.hop_length
        first, last = piece.start * hop, piece.stop * hop
        offset = piece.read_start * hop
        head = wav[first - piece.fade_in - offset : first + piece.fade_in - offset]
        if piece.joined:
            lead = [crossfade(self._tail, head)]
        else:
            lead = [self._end(), self._silence(first - piece.fade_in), _faded(head, rising=True)]
        body = wav[first + piece.fade_in - offset : last - piece.fade_out - offset]
        self._tail = wav[last - piece.fade_out - offset : last + piece.fade_out - offset]
        self._written = last - piece.fade_out
        return np.concatenate([*lead, body])

    def finish(self, num_samples: int) -> Array:
        """Return the rest of a song of `num_samples`; empty where more is already written."""
        return np.concatenate([self._end(), self._silence(num_samples)])

    def _end(self) -> Array:
        """Fade the last piece to silence."""
        self._written += len(self._tail)
        tail, self._tail = self._tail, np.zeros(0, np.float32)
        return _faded(tail, rising=False)

    def _silence(self, until: int) -> Array:
        silence = np.zeros(max(0, until - self._written), np.float32)
        self._written += len(silence)
        return silence


def crossfade(old: Array, new: Array) -> Array:
    """Cross-fade (T,) from `old` into `new` at equal power, for any correlation of the two.

    For identical signals the gains add up to 1; for uncorrelated ones their squares do. In between
    the measured correlation decides.
    """
    rising, falling = _gains(len(old))
    energy = float(np.sqrt(np.square(old).sum(dtype=np.float64) * np.square(new).sum(dtype=float)))
    correlation = float(np.dot(old.astype(np.float64), new)) / energy if energy > 0 else 0.0
    level = np.sqrt(1 + 2 * max(0.0, correlation) * rising * falling)
    both: Array = ((old * falling + new * rising) / level).astype(np.float32)
    return both


def _gains(length: int) -> tuple[Array, Array]:
    """Return the rising and the falling gain (length,): quarters of a sine and of a cosine."""
    angle = (np.arange(length) + 0.5) / max(1, length) * (np.pi / 2)
    return np.sin(angle).astype(np.float32), np.cos(angle).astype(np.float32)


def _faded(wav: Array, rising: bool) -> Array:
    gain = _gains(len(wav))[0 if rising else 1]
    return wav * np.square(gain)


def _nearest(sample: int, hop_length: int) -> int:
    return (sample + hop_length // 2) // hop_length


def _fade(samples: int, own: int, beside: int, hop_length: int) -> int:
    """Return the samples of a fade on each side of a boundary; own, beside: frames beside it."""
    return min(samples, own * hop_length, beside * hop_length) // 2
