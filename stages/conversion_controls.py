"""What is asked of a conversion: another key, consonants left alone, the song's own dynamics."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from stages.types import Array

_HOP_S = 0.05  # of the envelope's points; one covers the hop before and the one after it
_FLOOR = 1e-6  # mean square, -60 dBFS: what is quieter has no envelope to speak of
_MOST_GAIN = 10.0  # 20 dB
_BESIDE = 0.5  # how much of its neighbour's protection a voiced frame takes


def transpose(f0: Array, semitones: float) -> Array:
    """A contour (F,) in Hz, 0 = unvoiced, that much higher; float32 (F,)."""
    return (f0 * np.float64(2 ** (semitones / 12))).astype(np.float32)


def semitones_between(f0: Array, target_hz: float) -> int:
    """Whole semitones that bring the median of the voiced frames of f0 (F,) nearest to `target_hz`.

    Raises ValueError when no frame is voiced, and for a target that is no frequency.
    """
    voiced = f0[f0 > 0]
    if len(voiced) == 0:
        raise ValueError("no frame is voiced, so there is no pitch to transpose from")
    if not 0 < target_hz < math.inf:
        raise ValueError(f"the pitch to transpose to is {target_hz} Hz; it must be above 0")
    return round(12 * math.log2(target_hz / float(np.median(voiced))))


def protect(units: Array, plain: Array, voiced: NDArray[np.bool_], ratio: float) -> Array:
    """Blended units that go back to the plain ones where nothing is sung: (F, D) -> (F, D).

    Consonants suffer most from units of other moments. ratio: 1 leaves unvoiced frames as they
    were, 0 changes nothing; voiced frames beside them go half as far. voiced: (F,) on the clock of
    the units. RVC's `protect` p, of which 0.5 is off, is a ratio of 1 - p.

    Raises ValueError for arrays that do not fit each other.
    """
    if not units.shape == plain.shape == (len(voiced), *units.shape[1:]):
        raise ValueError(
            f"units are {units.shape}, the plain ones {plain.shape}, voiced is {voiced.shape}"
        )
    unvoiced = np.pad(~voiced, 1)
    beside = unvoiced[:-2] | unvoiced[2:]
    share = ratio * np.where(voiced, _BESIDE * beside, 1.0).astype(np.float32)[:, None]  # (F, 1)
    mixed: Array = ((1 - share) * units + share * plain).astype(np.float32)
    return mixed


class EnvelopeMix:
    """The loudness of a converted song drawn towards the song's, moment by moment.

    The song comes in pieces of any length; the samples that leave do not depend on where it was
    cut. At every 50 ms from its beginning the gain is (song's RMS / converted RMS) ** ratio, over
    the 50 ms before and after, and linear in between. Both levels are taken to be at least about
    -60 dBFS, and the gain is at most 20 dB, so what is nearly silent is not blown up.

    It is rms_mix_rate of RVC (1 - ratio there) and loudness_envelope_adjustment of so-vits-svc,
    which look at a second every half second and lose the onsets.

    ratio: 0 keeps the voice's own loudness, 1 gives it the song's.
    """

    def __init__(self, ratio: float, sample_rate: int) -> None:
        self.ratio = ratio
        self.hop = max(1, round(_HOP_S * sample_rate))
        self._held = np.zeros((2, 0), np.float32)  # converted and song, from a point on
        self._before = np.zeros(2)  # their energies in the hop before that

    def push(self, wav: Array, song: Array) -> Array:
        """The next samples (T,) of both, at one gain; -> those that are decided, up to 100 ms late.

        Raises ValueError when they are not as long as each other.
        """
        if wav.shape != song.shape:
            raise ValueError(f"{wav.shape} samples were sung, and the song has {song.shape}")
        self._held = np.concatenate([self._held, np.stack([wav, song])], axis=1)
        hops = self._held.shape[1] // self.hop
        return self._decided(hops) if hops > 1 else wav[:0]

    def finish(self) -> Array:
        """The samples that are left; what was pushed has then come back whole."""
        length = self._held.shape[1]
        hops = -(-length // self.hop) + 1  # one of silence, for the gain at the end
        self._held = np.pad(self._held, ((0, 0), (0, hops * self.hop - length)))
        return self._decided(hops)[:length]

    def _decided(self, hops: int) -> Array:
        """All but the last of the first `hops` hops that are held."""
        leave = hops - 1
        wav, song = self._held[:, : hops * self.hop].reshape(2, hops, self.hop)
        energy = np.square([wav, song], dtype=np.float64).sum(axis=2)  # (2, hops)
        around = np.concatenate([self._before[:, None], energy], axis=1)
        sung, asked = (around[:, :-1] + around[:, 1:]) / (2 * self.hop) + _FLOOR
        gain = np.minimum((asked / sung) ** (self.ratio / 2), _MOST_GAIN)  # (hops,), at points
        rise = np.diff(gain)[:, None] * (np.arange(self.hop) / self.hop)
        out: Array = (wav[:leave] * (gain[:leave, None] + rise)).astype(np.float32).reshape(-1)
        if leave:
            self._before = energy[:, leave - 1]
        self._held = self._held[:, leave * self.hop :].copy()
        return out
