"""Detection of a second voice or an instrument beside the voice whose pitch is known.

In each frame the partials of the first series are taken out of the spectrum; what remains is summed
over the partials of every other pitch, as in A. Klapuri, "Multiple fundamental frequency estimation
by summing harmonic amplitudes", ISMIR 2006.

Tested by tests/stages/quality/test_pitch.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stages.types import Array

# The constants were chosen on the recordings that `second_voice` speaks of.
_WINDOW_S = 0.07
_STEP_S = 0.03
_BAND_HZ = (60.0, 2000.0)
_FLOOR_BAND_HZ = 500.0
_ABOVE_FLOOR = 2.0  # times the median of the band around: what is weaker is no partial
_PARTIALS = 5
_WEIGHTS = 0.7 ** np.arange(_PARTIALS)

# Times f0: estimators err by octaves, and find pitches of which those of two voices are multiples.
_FIRST_MULTIPLES = np.array([1, 1 / 3, 1 / 2, 2, 3, 4, 5])
_FIRST_MAX_HZ = 1100.0
_STEPS_PER_OCTAVE = 48
_SECOND_HZ = 70 * np.exp2(np.arange(4 * _STEPS_PER_OCTAVE) / _STEPS_PER_OCTAVE)  # to 1.1 kHz
_DRIFT_STEPS = 2  # half a semitone from one frame to the next
# Pitches of which period doubling, smeared partials and octave errors leave traces in a solo voice.
_RELATED = (1 / 4, 1 / 3, 1 / 2, 2 / 3, 1, 3 / 2, 2, 3)
_RELATED_SEMITONES = 1.0

_STRONG = 0.15
_SUSPECT_SHARE = 0.1
_LEAST_VOICED_S = 2.0  # in less, a few odd frames would be a large share
_BLOCK_FRAMES = 1000


def second_voice(wav: Array, sample_rate: int, f0: Array, hop_length: int) -> float:
    """Return the suspicion, 0 to 1, that two harmonic series sound in a clip (T,) at once.

    f0: (F,) Hz at samples 0, hop, ...; 0 = unvoiced. Every 30 ms a voiced frame is examined. It
    counts when a second pitch is 0.15 as strong as the first, there and 30 ms before or after. The
    suspicion is 0.5 where a tenth of the frames count (of 2 s at least), and share / (share + 0.1)
    in general.

    Above 0.5, in clips of 5 s with Praat's f0: none of 21 solo ones, as they are, with noise at 20
    or 10 dB, or in a room that rings for 0.5 s with a quarter of the voice's energy (of 3.5 s, an
    eighth); a third of them where the room is as loud as the voice; 27 of 28 of a song with guitar
    and an ensemble; of mixtures of two singers at 0, -6 and -12 dB 0.96, 0.96 and 0.44. With DIO's
    f0, which finds less of two voices voiced, 0.56, 0.64 and 0.32 of these.

    It misses a second voice that is silent wherever the first is voiced, one that keeps to the
    first's unison, octaves, fifth or twelfth, and partials above 2 kHz.
    """
    step = max(1, round(_STEP_S * sample_rate / hop_length))
    frames = np.flatnonzero(f0 > 0)
    frames = frames[(frames % step == 0) & (frames * hop_length < len(wav))]
    if len(frames) == 0:
        return 0.0
    octaves = np.log2(np.where(f0 > 0, f0, np.nan).astype(np.float64))
    slope = np.gradient(octaves) if len(f0) > 1 else np.zeros(1)
    glide = np.abs(np.nan_to_num(slope)) * sample_rate / hop_length  # octaves per second
    strength = np.concatenate(
        [
            _second_strength(wav, sample_rate, block * hop_length, f0[block], glide[block])
            for block in np.array_split(frames, -(-len(frames) // _BLOCK_FRAMES))
        ]
    )
    suspect = _sustained(strength, np.diff(frames) == step).max(axis=1) >= _STRONG
    least = _LEAST_VOICED_S * sample_rate / hop_length / step
    share = float(np.count_nonzero(suspect) / max(len(suspect), least))
    return share / (share + _SUSPECT_SHARE)


def _second_strength(
    wav: Array,
    sample_rate: int,
    centres: NDArray[np.intp],
    f0: Array,
    glide: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return (N, C): the strength of each pitch of `_SECOND_HZ`, that of the first being 1."""
    partials, bin_hz = _spectra(wav, sample_rate, centres)
    candidates = f0[:, None].astype(np.float64) * _FIRST_MULTIPLES
    strengths = _summed(partials, candidates, bin_hz)
    strengths[:, 1:][candidates[:, 1:] > _FIRST_MAX_HZ] = 0
    best = strengths.argmax(axis=1)[:, None]
    first_hz = np.take_along_axis(candidates, best, axis=1)  # (N, 1)
    first = np.take_along_axis(strengths, best, axis=1)

    hz = np.arange(partials.shape[1]) * bin_hz
    number = np.maximum(1, np.round(hz / first_hz))  # (N, K): the nearest partial of the first
    travel = number * first_hz * np.log(2) * glide[:, None] * _WINDOW_S
    width = 2 / _WINDOW_S + travel  # half the main lobe of a Hann window
    rest = np.where(np.abs(hz - number * first_hz) < width, 0, partials)

    second = _summed(rest, np.broadcast_to(_SECOND_HZ, (len(f0), len(_SECOND_HZ))), bin_hz)
    for ratio in _RELATED:
        apart = np.abs(12 * np.log2(_SECOND_HZ / (ratio * first_hz)))
        second[apart < _RELATED_SEMITONES] = 0
    return np.where(first > 0, second / np.where(first > 0, first, 1), 0)


def _spectra(
    wav: Array, sample_rate: int, centres: NDArray[np.intp]
) -> tuple[NDArray[np.float32], float]:
    """Return amplitudes (N, K) above the noise around each sample, and Hz of one bin."""
    from scipy import fft
    from scipy.ndimage import median_filter

    half = round(_WINDOW_S / 2 * sample_rate)
    n_fft = fft.next_fast_len(4 * half, real=True)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(wav, half), 2 * half)[centres]
    spectra = fft.rfft(windows * np.hanning(2 * half).astype(np.float32), n_fft, axis=1)
    bin_hz = sample_rate / n_fft
    lowest, highest = (round(hz / bin_hz) for hz in _BAND_HZ)
    amplitude = np.abs(spectra[:, : highest + 1])
    # Every fourth bin describes the noise well enough, at a sixteenth of the cost.
    around = 1 + round(_FLOOR_BAND_HZ / bin_hz / 4)
    floor = np.repeat(median_filter(amplitude[:, ::4], size=(1, around), mode="nearest"), 4, axis=1)
    partials = np.maximum(amplitude - _ABOVE_FLOOR * floor[:, : highest + 1], 0)
    partials[:, :lowest] = 0
    return partials, bin_hz


def _summed(
    partials: NDArray[np.float32], pitches: NDArray[np.float64], bin_hz: float
) -> NDArray[np.float64]:
    """Return (N, C): weighted sums over the first partials of pitches (N, C) in spectra (N, K)."""
    from scipy.ndimage import maximum_filter1d

    near = maximum_filter1d(partials, 3, axis=1)
    total = np.zeros(pitches.shape)
    for number, weight in enumerate(_WEIGHTS, start=1):
        k = np.round(number * pitches / bin_hz).astype(np.intp)
        inside = k < partials.shape[1]
        total += weight * inside * np.take_along_axis(near, np.where(inside, k, 0), axis=1)
    return total


def _sustained(strength: NDArray[np.float64], adjacent: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return (N, C): the strength of each pitch both in a frame and in the one before or after.

    The pitch may drift by half a semitone. adjacent: (N - 1,), which frames follow one another.
    """
    from scipy.ndimage import maximum_filter1d

    near = maximum_filter1d(strength, 2 * _DRIFT_STEPS + 1, axis=1)
    before = np.zeros_like(strength)
    after = np.zeros_like(strength)
    before[1:] = near[:-1] * adjacent[:, None]
    after[:-1] = near[1:] * adjacent[:, None]
    return np.minimum(strength, np.maximum(before, after))
