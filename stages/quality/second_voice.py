"""Detection of a second voice or an instrument beside the voice whose pitch is known.

In each frame the partials of the first series are taken out of the spectrum; what remains is summed
over the partials of every other pitch, as in A. Klapuri, "Multiple fundamental frequency estimation
by summing harmonic amplitudes", ISMIR 2006.

Tested by tests/stages/quality/test_pitch.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.types import Array

# docs/quality.md says on which recordings the constants were chosen, and how often they err.
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

_PRESENT = 0.03  # of the strongest partial in the frame
_INCOMPLETE = 0.6  # of the first partials of a pitch
_LEAST_VOICED_S = 2.0  # in less, a few odd frames would be a large share
_BLOCK_FRAMES = 1000


@dataclass(frozen=True)
class Rules:
    """Limits from which a frame and a clip are suspect.

    strong: strength of a second pitch that makes a frame suspect; that of the first is 1.
    share: suspect share of the frames where the suspicion is 0.5.
    complete: whether the pitch of the first voice must have most of its first partials. Else that
      of a voice with one strong formant is taken for a multiple, and its own partials for another.
    """

    strong: float
    share: float
    complete: bool


RULES = Rules(strong=0.05, share=0.16, complete=True)
EARLIER_RULES = Rules(strong=0.15, share=0.1, complete=False)  # of schema versions 2 and 3


@dataclass(frozen=True)
class Suspects:
    """Examined frames of a recording and the suspect ones, which add up over its parts.

    least: number of frames below which a few odd ones would be a large share.
    """

    suspect: int = 0
    examined: int = 0
    least: float = 1.0

    def __add__(self, other: Suspects) -> Suspects:
        return Suspects(
            self.suspect + other.suspect,
            self.examined + other.examined,
            max(self.least, other.least),
        )

    @property
    def share(self) -> float:
        return self.suspect / max(self.examined, self.least)

    def suspicion(self, rules: Rules = RULES) -> float:
        """Return the suspicion, 0 to 1, that two harmonic series sound at once."""
        return self.share / (self.share + rules.share)


def second_voice(
    wav: Array, sample_rate: int, f0: Array, hop_length: int, rules: Rules = RULES
) -> float:
    """Return the suspicion, 0 to 1, that two harmonic series sound in a clip (T,) at once.

    f0: (F,) Hz at samples 0, hop, ...; 0 = unvoiced. Every 30 ms a voiced frame is examined. It
    counts when a second pitch is 0.05 as strong as the first, there and 30 ms before or after. The
    suspicion is 0.5 where 16 % of the frames count (of 2 s at least), and
    share / (share + 0.16) in general. docs/quality.md has the error rates.

    It misses a second voice that is silent wherever the first is voiced, one that keeps to the
    first's unison, octaves, fifth or twelfth, and partials above 2 kHz.
    """
    return suspects(wav, sample_rate, f0, hop_length, rules).suspicion(rules)


def suspects(
    wav: Array, sample_rate: int, f0: Array, hop_length: int, rules: Rules = RULES
) -> Suspects:
    """Count the frames in which a second harmonic series sounds. Arguments as `second_voice`."""
    step = max(1, round(_STEP_S * sample_rate / hop_length))
    frames = np.flatnonzero(f0 > 0)
    frames = frames[(frames % step == 0) & (frames * hop_length < len(wav))]
    least = _LEAST_VOICED_S * sample_rate / hop_length / step
    if len(frames) == 0:
        return Suspects(0, 0, least)
    octaves = np.log2(np.where(f0 > 0, f0, np.nan).astype(np.float64))
    slope = np.gradient(octaves) if len(f0) > 1 else np.zeros(1)
    glide = np.abs(np.nan_to_num(slope)) * sample_rate / hop_length  # octaves per second
    strength = np.concatenate(
        [
            _second_strength(wav, sample_rate, block * hop_length, f0[block], glide[block], rules)
            for block in np.array_split(frames, -(-len(frames) // _BLOCK_FRAMES))
        ]
    )
    suspect = _sustained(strength, np.diff(frames) == step).max(axis=1) >= rules.strong
    return Suspects(int(np.count_nonzero(suspect)), len(frames), least)


def _second_strength(
    wav: Array,
    sample_rate: int,
    centres: NDArray[np.intp],
    f0: Array,
    glide: NDArray[np.float64],
    rules: Rules,
) -> NDArray[np.float64]:
    """Return (N, C): the strength of each pitch of `_SECOND_HZ`, that of the first being 1."""
    partials, bin_hz = _spectra(wav, sample_rate, centres)
    candidates = f0[:, None].astype(np.float64) * _FIRST_MULTIPLES
    strengths = _summed(partials, candidates, bin_hz)
    strengths[:, 1:][candidates[:, 1:] > _FIRST_MAX_HZ] = 0
    evidence = strengths
    if rules.complete:
        present = _present(partials, candidates, bin_hz)
        evidence = strengths * np.square(present)
        # Multiples are for f0 of which few partials sound: an octave error, or two voices.
        evidence[:, _FIRST_MULTIPLES > 1] *= present[:, :1] <= _INCOMPLETE
    best = evidence.argmax(axis=1)[:, None]
    first_hz = np.take_along_axis(candidates, best, axis=1)  # (N, 1)
    first = strengths.max(axis=1)[:, None]

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
    total = np.zeros(pitches.shape)
    for weight, amplitude in zip(_WEIGHTS, _near_partials(partials, pitches, bin_hz), strict=True):
        total += weight * amplitude
    return total


def _near_partials(
    partials: NDArray[np.float32], pitches: NDArray[np.float64], bin_hz: float
) -> Iterator[NDArray[np.float64]]:
    """Yield (N, C) for each of the first partials: its amplitude, 0 above the band."""
    from scipy.ndimage import maximum_filter1d

    near = maximum_filter1d(partials, 3, axis=1)
    for number in range(1, _PARTIALS + 1):
        k = np.round(number * pitches / bin_hz).astype(np.intp)
        inside = k < partials.shape[1]
        yield inside * np.take_along_axis(near, np.where(inside, k, 0), axis=1)


def _present(
    partials: NDArray[np.float32], pitches: NDArray[np.float64], bin_hz: float
) -> NDArray[np.float64]:
    """Return (N, C): the share of the first partials of pitches (N, C) that the spectra have."""
    least = _PRESENT * partials.max(axis=1, keepdims=True)
    near = _near_partials(partials, pitches, bin_hz)
    share: NDArray[np.float64] = np.mean([amplitude > least for amplitude in near], axis=0)
    return share


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
