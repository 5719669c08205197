"""DIO: f0 from the zero crossings of the voice after low-pass filters half an octave apart.

M. Morise, H. Kawahara, H. Katayose, "Fast and reliable F0 estimation method based on the period
extraction of vocal fold vibration of singing voice and speech", AES 35, 2009. The constants and
the repairs of the contour are those of WORLD (M. Morise et al., IEICE Transactions E99-D, 2016).
Where a filter leaves only the fundamental, the four kinds of events in a period (upward and
downward crossings, peaks and dips) occur at one rate. The filter in which they agree best decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stages.frames import Track

_Floats = NDArray[np.float64]

_LOW_CUT_HZ = 50
_BANDS_IN_OCTAVE = 2
_ALLOWED_CHANGE = 0.1  # of f0, from one frame to the next
_NO_SCORE = 1e5
_TINY = 1e-12


def dio_track(wav: _Floats, sample_rate: int, f0_min: float, f0_max: float, hop: int) -> Track:
    """Estimate f0 of `wav` (T,) at every hop: Hz and times in seconds, both (N,)."""
    hop_ms = 1000 * hop / sample_rate
    frames = int(1000 * len(wav) / sample_rate / hop_ms) + 1
    times = np.arange(frames) * hop_ms / 1000
    edge = 2 * int(0.5 + 1000 / hop_ms / f0_min) + 1  # frames in two longest periods
    if frames <= edge:
        return np.zeros(frames), times
    events = _events(wav, _bank(sample_rate, f0_min, f0_max))
    candidates = np.zeros((len(events), frames))
    scores = np.full((len(events), frames), _NO_SCORE)
    for band, (ceiling, kinds) in enumerate(events):
        if min(map(len, kinds)) < 4:
            continue
        rates = np.stack([_rate(at, times, sample_rate) for at in kinds])  # (4, N)
        f0 = rates.mean(axis=0)
        inside = (f0 >= max(f0_min, ceiling / 2)) & (f0 <= min(f0_max, ceiling))
        candidates[band] = np.where(inside, f0, 0.0)
        scores[band] = np.where(inside, rates.std(axis=0, ddof=1), _NO_SCORE)
    best = (scores / (candidates + _TINY)).argmin(axis=0)
    f0 = candidates[best, np.arange(frames)]
    return _extended(_steady(f0, edge), candidates), times


@dataclass(frozen=True)
class _Bank:
    """Low-pass filters, each after the low cut, for blocks of a signal (overlap-save)."""

    ceilings: _Floats  # (bands,) highest fundamental of each band in Hz
    spectra: NDArray[np.complex128]  # (bands, size // 2 + 1)
    size: int  # of a block's FFT
    reach: int  # samples on each side that a filtered sample depends on


@lru_cache(maxsize=4)
def _bank(sample_rate: int, f0_min: float, f0_max: float) -> _Bank:
    bands = 1 + int(math.log(f0_max / f0_min) / math.log(2) * _BANDS_IN_OCTAVE)
    ceilings = f0_min * 2.0 ** (np.arange(1, bands + 1) / _BANDS_IN_OCTAVE)
    cut = int(sample_rate / _LOW_CUT_HZ + 0.5)
    low_cut = -np.hanning(2 * cut + 3)[1:-1]
    low_cut /= -low_cut.sum()
    low_cut[cut] += 1
    halves = [int(sample_rate / ceiling / 2 + 0.5) for ceiling in ceilings]
    reach = 2 * halves[0] + cut
    size = 1 << (8 * reach - 1).bit_length()
    impulses = np.zeros((bands, size))
    for impulse, half in zip(impulses, halves, strict=True):
        taps = np.convolve(_nuttall(4 * half), low_cut)
        centre = 2 * half + cut
        impulse[: len(taps) - centre] = taps[centre:]
        impulse[-centre:] = taps[:centre]
    return _Bank(ceilings, np.fft.rfft(impulses), size, reach)


def _nuttall(length: int) -> _Floats:
    phase = 2 * np.pi * np.arange(length) / (length - 1)
    window: _Floats = (
        0.355768
        - 0.487396 * np.cos(phase)
        + 0.144232 * np.cos(2 * phase)
        - 0.012604 * np.cos(3 * phase)
    )
    return window


def _events(wav: _Floats, bank: _Bank) -> list[tuple[float, list[_Floats]]]:
    """Return the ceiling of each band and the positions of its events in samples.

    The four kinds of events are downward and upward zero crossings, peaks and dips.
    """
    mean = wav.sum() / (len(wav) + 1)
    length = len(wav) + 1  # one zero after the clip takes part
    step = bank.size - 2 * bank.reach - 2
    # In digital silence the signs of rounding errors would decide. A tone at half the sample rate,
    # of their magnitude, makes them alternate at a rate far above any voice.
    tone = np.abs(wav).max() * np.finfo(np.float64).eps * bank.size * np.abs(bank.spectra).max(1)
    positions: list[list[list[_Floats]]] = [[[] for _ in range(4)] for _ in bank.ceilings]
    tail = np.zeros((len(bank.ceilings), 0))
    for start in range(0, length - 1, step):
        block = np.zeros(bank.size)
        first, last = start - bank.reach, start - bank.reach + bank.size
        inside = slice(max(first, 0), min(last, length))
        block[inside.start - first : inside.stop - first] = -mean
        samples = wav[inside]
        block[inside.start - first : inside.start - first + len(samples)] += samples
        spectra = np.fft.rfft(block) * bank.spectra
        spectra[:, -1] += tone
        filtered = np.fft.irfft(spectra, bank.size)
        y = filtered[:, bank.reach : bank.reach + min(step + 2, length - start)]
        y[:, : tail.shape[1]] = tail  # reuse the overlap, so that each sign is decided once
        tail = y[:, -2:].copy()
        slope = np.diff(y)
        count = min(step, y.shape[1] - 1)
        for kind, (values, fell) in enumerate(
            [(y, y > 0), (y, y < 0), (slope, slope > 0), (slope, slope < 0)]
        ):
            n = min(count, values.shape[1] - 1)
            hits = np.flatnonzero(fell[:, :n] > fell[:, 1 : n + 1])
            band, at = np.divmod(hits, n)
            before, after = values[band, at], values[band, at + 1]
            where = start + at + 1 - before / (after - before)
            for b, part in enumerate(np.split(where, np.searchsorted(band, np.arange(1, len(y))))):
                positions[b][kind].append(part)
    return [
        (float(ceiling), [np.concatenate(parts) for parts in kinds])
        for ceiling, kinds in zip(bank.ceilings, positions, strict=True)
    ]


def _rate(at: _Floats, times: _Floats, sample_rate: int) -> _Floats:
    """Return events per second (N,) at `times`, interpolated between the middles of intervals."""
    rate = sample_rate / np.diff(at)
    middle = (at[:-1] + at[1:]) / 2 / sample_rate
    left = np.clip(np.searchsorted(middle, times) - 1, 0, len(middle) - 2)
    weight = (times - middle[left]) / (middle[left + 1] - middle[left])
    out: _Floats = rate[left] + weight * (rate[left + 1] - rate[left])
    return out


def _steady(f0: _Floats, edge: int) -> _Floats:
    """Keep f0 where it is steady over `edge` frames around; drop `edge` frames at both ends."""
    f0 = f0.copy()
    f0[:edge] = 0
    f0[-edge:] = 0
    change = np.abs(np.diff(f0, prepend=0.0))
    broken = (f0 == 0) | (change >= _ALLOWED_CHANGE * (f0 + _TINY))
    half = (edge - 1) // 2
    around = np.convolve(broken, np.ones(2 * half + 1), mode="same")
    return np.where(around > 0.5, 0.0, f0)


def _extended(f0: _Floats, candidates: _Floats) -> _Floats:
    """Extend voiced runs over candidates close to their extrapolation, forwards then backwards.

    A run extends at most to the end of the next one.
    """
    voiced = np.flatnonzero(np.diff(f0 > 0))
    if len(voiced) == 0:
        return f0
    starts, ends = voiced[::2] + 1, voiced[1::2]
    out: list[float] = f0.tolist()
    choices: list[list[float]] = candidates.T.tolist()
    last = len(out) - 1
    for end, limit in zip(ends, [*ends[1:], last], strict=True):
        for i in range(end + 1, limit + 1):
            out[i] = _nearest(choices[i], out[i - 1], out[i - 2])
            if out[i] == 0:
                break
    for start, limit in zip(starts[::-1], [*starts[-2::-1], 1], strict=True):
        for i in range(start - 1, limit - 1, -1):
            out[i] = _nearest(choices[i], out[i + 1], out[i + 2])
            if out[i] == 0:
                break
    return np.array(out)


def _nearest(choices: list[float], neighbour: float, beyond: float) -> float:
    """Return the choice nearest to the line through the last two values, 0 if none is close."""
    expected = (3 * neighbour - beyond) / 2
    best = min(choices, key=lambda choice: abs(expected - choice))
    return best if abs(expected - best) <= _ALLOWED_CHANGE * abs(expected) else 0.0
