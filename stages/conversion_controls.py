"""Controls of a conversion: transpose, protect consonants, follow the song's dynamics."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from stages.types import Array

_HOP_S = 0.05  # between points of the envelope; a point covers one hop before and one after it
_FLOOR = 1e-6  # mean square, -60 dBFS: lower limit of both levels
_MAX_GAIN = 10.0  # 20 dB
_BESIDE = 0.5  # protection of a voiced frame next to an unvoiced one, as a share


def transpose(f0: Array, semitones: float) -> Array:
    """Shift a contour (F,) in Hz, 0 = unvoiced, by `semitones`; float32 (F,)."""
    return (f0 * np.float64(2 ** (semitones / 12))).astype(np.float32)


def semitones_between(f0: Array, target_hz: float, step: int = 1) -> int:
    """Return the semitones that move the median of voiced f0 (F,) nearest to `target_hz`.

    step: they are a multiple of it; 12 keeps the key.

    Raises: ValueError: when no frame is voiced or the target is not a positive frequency.
    """
    voiced = f0[f0 > 0]
    if len(voiced) == 0:
        raise ValueError("no frame is voiced, so there is no pitch to transpose")
    if not 0 < target_hz < math.inf:
        raise ValueError(f"the target pitch is {target_hz} Hz; it must be finite and above 0")
    return step * round(12 / step * math.log2(target_hz / float(np.median(voiced))))


def protect(units: Array, plain: Array, voiced: NDArray[np.bool_], ratio: float) -> Array:
    """Restore the plain units in unvoiced frames of retrieved units: (F, D) -> (F, D).

    Retrieval harms consonants most. ratio: 1 restores unvoiced frames fully, 0 changes nothing;
    voiced frames next to them are restored half as much. voiced: (F,) on the clock of the units.
    RVC's `protect` p, where 0.5 means off, is a ratio of 1 - p.

    Raises: ValueError: when the shapes of the arrays differ.
    """
    if not units.shape == plain.shape == (len(voiced), *units.shape[1:]):
        raise ValueError(
            f"shapes differ: units {units.shape}, plain units {plain.shape}, voiced {voiced.shape}"
        )
    unvoiced = np.pad(~voiced, 1)
    beside = unvoiced[:-2] | unvoiced[2:]
    share = ratio * np.where(voiced, _BESIDE * beside, 1.0).astype(np.float32)[:, None]  # (F, 1)
    mixed: Array = ((1 - share) * units + share * plain).astype(np.float32)
    return mixed


class EnvelopeMix:
    """A time-varying gain that moves the loudness of a converted song towards the source song's.

    The song may be pushed in blocks of any length; the output does not depend on the blocks. Every
    50 ms from the start the gain is (source RMS / converted RMS) ** ratio, measured over the 50 ms
    before and after; it is linear in between. Both levels are at least -60 dBFS and the gain is at
    most 20 dB, so near-silence is not amplified.

    RVC calls this rms_mix_rate (1 - ratio there), so-vits-svc loudness_envelope_adjustment. Both
    measure one second every half second, which loses onsets.

    ratio: 0 keeps the converted loudness, 1 takes the source's.
    """

    def __init__(self, ratio: float, sample_rate: int) -> None:
        self.ratio = ratio
        self.hop = max(1, round(_HOP_S * sample_rate))
        self._waiting = np.zeros((2, 0), np.float32)  # converted and source, from a point on
        self._before = np.zeros(2)  # their energies in the hop before that point

    def push(self, wav: Array, song: Array) -> Array:
        """Take the next samples (T,) of both; return converted samples, delayed by up to 100 ms.

        Raises: ValueError: when the two differ in length.
        """
        if wav.shape != song.shape:
            raise ValueError(f"lengths differ: {wav.shape} converted, {song.shape} in the song")
        self._waiting = np.concatenate([self._waiting, np.stack([wav, song])], axis=1)
        hops = self._waiting.shape[1] // self.hop
        return self._apply(hops) if hops > 1 else wav[:0]

    def finish(self) -> Array:
        """Return the remaining samples; the output is then as long as the input."""
        length = self._waiting.shape[1]
        hops = -(-length // self.hop) + 1  # one of silence, for the gain at the end
        self._waiting = np.pad(self._waiting, ((0, 0), (0, hops * self.hop - length)))
        return self._apply(hops)[:length]

    def _apply(self, hops: int) -> Array:
        """Return the first `hops` - 1 waiting hops of the converted song, with their gain."""
        ready = hops - 1
        wav, song = self._waiting[:, : hops * self.hop].reshape(2, hops, self.hop)
        energy = np.square([wav, song], dtype=np.float64).sum(axis=2)  # (2, hops)
        around = np.concatenate([self._before[:, None], energy], axis=1)
        converted, source = (around[:, :-1] + around[:, 1:]) / (2 * self.hop) + _FLOOR
        gain = np.minimum((source / converted) ** (self.ratio / 2), _MAX_GAIN)  # (hops,), at points
        rise = np.diff(gain)[:, None] * (np.arange(self.hop) / self.hop)
        out: Array = (wav[:ready] * (gain[:ready, None] + rise)).astype(np.float32).reshape(-1)
        if ready:
            self._before = energy[:, ready - 1]
        self._waiting = self._waiting[:, ready * self.hop :].copy()
        return out
