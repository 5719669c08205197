"""A synthetic singer: songs with exactly known f0, for the demo and the tests.

    score -> control curves (200 Hz) -> pulses + noise -> glottis and vocal tract -> song

The source is a sum of harmonics up to 10 kHz in closed form (the band-limited impulse train of
Stilson & Smith 1996), so its pitch is the control curve itself and nothing aliases. Each stretch of
about 12 ms is filtered by the spectrum of a glottal pulse (KLGLOTT88, Klatt & Klatt 1990) and by a
cascade of formant resonators (Klatt 1980), with cross-fades between stretches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from stages.types import Array

Curve = NDArray[np.float64]
"""Values on a regular time grid, (N,)."""

_CONTROL_HZ = 200.0
_HIGHEST_HARMONIC_HZ = 10_000.0
_PEAK = 0.5
_FLOOR_DB = -76.0  # noise of the room, RMS
_VOICED_ABOVE = 0.05  # voicing gain (0 to 1) above which a frame counts as voiced
_GROWLS_HZ = 0.9  # rate at which a growl swells
_BLOCK_FRAMES = 256

# F1 to F3 in Hz of a man's vowels (Peterson & Barney 1952), and of two voiced consonants.
_VOWELS: dict[str, tuple[float, float, float]] = {
    "a": (730, 1090, 2440),
    "e": (530, 1840, 2480),
    "i": (270, 2290, 3010),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
    "m": (250, 1100, 2200),
    "l": (360, 1300, 2700),
}
_VOICED_CONSONANTS = ("m", "l")
_UPPER_FORMANTS_HZ = (3500.0, 4500.0, 5500.0, 6600.0, 7700.0)
_RINGING_FORMANTS_HZ = (2850.0, 3300.0, 4600.0, 6000.0, 7300.0)  # F3 to F5 close together
_BANDWIDTHS_HZ = (70.0, 90.0, 120.0, 160.0, 200.0, 300.0, 400.0, 500.0)

# Unvoiced consonants: centre and width of the noise in octaves around it, closure, noise, level.
_NOISES: dict[str, tuple[float, float, float, float, float]] = {
    "s": (6500.0, 0.35, 0.0, 0.11, 0.10),
    "sh": (3300.0, 0.45, 0.0, 0.11, 0.12),
    "f": (4500.0, 1.20, 0.0, 0.08, 0.05),
    "t": (4200.0, 0.60, 0.05, 0.025, 0.14),
    "k": (1900.0, 0.35, 0.05, 0.035, 0.14),
}
_MAJOR_SCALE = (0, 2, 4, 5, 7, 9, 11)


@dataclass(frozen=True, kw_only=True)
class FormantVoice:
    """Settings of one singer.

    f0_min, f0_max: Hz, lowest and highest note; vibrato and drift go a little beyond.
    formant_scale: 1 is a man's vocal tract, larger a shorter one.
    ring: 0 to 1, strength of the singer's formant (upper formants clustered at 3 kHz).
    breathiness: 0 to 1, level of breath noise.
    growl: 0 to 1, alternation of louder and softer pulses, as when the false vocal folds vibrate at
      half the rate of the glottis; adds intermittent harmonics of f0 / 2.
    vibrato_hz, vibrato_cents: rate, and deviation to each side.
    open_quotient: share of a period for which the glottis is open.
    tilt_hz: frequency above which the source falls by another 6 dB per octave.
    """

    name: str
    f0_min: float
    f0_max: float
    formant_scale: float = 1.0
    ring: float = 0.0
    breathiness: float = 0.2
    growl: float = 0.0
    vibrato_hz: float = 5.5
    vibrato_cents: float = 40.0
    open_quotient: float = 0.6
    tilt_hz: float = 2500.0

    def __post_init__(self) -> None:
        if not 30 <= self.f0_min or not self.f0_min * 1.4 < self.f0_max <= 1500:
            raise ValueError(
                f"f0_min and f0_max of a voice must span half an octave within 30 to 1500 Hz, "
                f"not {self.f0_min} to {self.f0_max}"
            )
        for key in ("ring", "breathiness", "growl"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} must lie between 0 and 1, not {getattr(self, key)}")
        if not 0.3 <= self.open_quotient <= 0.9:
            raise ValueError(f"open_quotient must lie in 0.3 to 0.9, not {self.open_quotient}")
        if not 0.5 <= self.formant_scale <= 2:
            raise ValueError(f"formant_scale must lie in 0.5 to 2, not {self.formant_scale}")


BASS = FormantVoice(
    name="bass", f0_min=82.4, f0_max=246.9, ring=0.6, breathiness=0.12,
    vibrato_hz=5.0, vibrato_cents=35, open_quotient=0.55, tilt_hz=2200,
)  # fmt: skip
ALTO = FormantVoice(
    name="alto", f0_min=164.8, f0_max=493.9, formant_scale=1.13, ring=0.15, breathiness=0.3,
    vibrato_hz=5.6, vibrato_cents=30, open_quotient=0.78, tilt_hz=2000,
)  # fmt: skip
SOPRANO = FormantVoice(
    name="soprano", f0_min=261.6, f0_max=784.0, formant_scale=1.19, breathiness=0.2,
    vibrato_hz=6.0, vibrato_cents=50, open_quotient=0.72, tilt_hz=2600,
)  # fmt: skip
VOICES = (BASS, ALTO, SOPRANO)


@dataclass(frozen=True)
class FormantSong:
    """A song with its true f0."""

    wav: Array  # (T,)
    f0: Array  # (F,) Hz at sample i * hop_length, 0 = unvoiced; F = T // hop_length
    sample_rate: int
    hop_length: int


@dataclass(frozen=True)
class _Note:
    start_s: float
    stop_s: float  # end of the sound; within a phrase, the start of the next note
    semitone: float  # MIDI note number
    vowel: str
    consonant: str  # at the start of the note; "" for none
    first: bool  # first note of its phrase
    gain: float


@dataclass(frozen=True)
class _Controls:
    """Control curves at `_CONTROL_HZ`, (K,) each; formants (K, 8)."""

    f0: Curve
    voicing: Curve  # gain of the pulses
    breath: Curve  # gain of the noise that passes the vocal tract
    formants: NDArray[np.float64]


def sing(
    voice: FormantVoice, duration_s: float, sample_rate: int, seed: int, hop_length: int = 512
) -> FormantSong:
    """Sing melodic phrases with rests between them; the same arguments give the same samples.

    Raises: ValueError: when the duration is below 1 s or the sample rate below 8000 Hz.
    """
    if duration_s < 1:
        raise ValueError(f"duration_s is {duration_s}; it must be 1 or more")
    if sample_rate < 8000:
        raise ValueError(f"sample_rate is {sample_rate}; it must be 8000 Hz or more")
    rng = np.random.default_rng(seed)
    num_samples = round(duration_s * sample_rate)
    notes = _compose(voice, duration_s, rng)
    controls = _perform(voice, notes, duration_s, rng)

    at: Curve = np.arange(num_samples, dtype=np.float64) * (_CONTROL_HZ / sample_rate)
    f0 = _sampled(controls.f0, at)
    voicing = _sampled(controls.voicing, at)
    cycles = np.cumsum(f0 / sample_rate)
    cycles -= cycles[0]
    white = rng.standard_normal(num_samples, dtype=np.float32)
    # Breath noise is strongest while the glottis is open.
    breath = _sampled(controls.breath, at) * white * (1 + 0.6 * np.cos(2 * np.pi * cycles))
    pulses = voicing * _harmonics(cycles, f0, sample_rate)
    if voice.growl:
        depth = voice.growl * np.sin(np.pi * _GROWLS_HZ * at / _CONTROL_HZ) ** 2
        pulses *= 1 + depth * np.cos(np.pi * cycles)
    wav = _vocal_tract(voice, pulses, breath, controls, sample_rate)
    wav *= _PEAK / max(1e-9, float(np.abs(wav).max()))
    _add_consonants(wav, notes, sample_rate, rng)
    wav += 10 ** (_FLOOR_DB / 20) * rng.standard_normal(num_samples)

    frames = slice(0, num_samples // hop_length * hop_length, hop_length)
    truth = np.where(voicing[frames] > _VOICED_ABOVE, f0[frames], 0.0)
    return FormantSong(
        np.clip(wav, -1.0, 1.0).astype(np.float32),
        truth.astype(np.float32),
        sample_rate,
        hop_length,
    )


def _compose(voice: FormantVoice, duration_s: float, rng: np.random.Generator) -> list[_Note]:
    """Compose phrases of 4 to 9 notes of a major scale, with rests of 0.3 to 2 s between them."""
    lowest, highest = (69 + 12 * np.log2(hz / 440) for hz in (voice.f0_min, voice.f0_max))
    tonic = np.ceil(lowest) + rng.integers(0, 5)
    scale = [n for n in np.arange(np.ceil(lowest), highest) if (n - tonic) % 12 in _MAJOR_SCALE]
    homes = [i for i, n in enumerate(scale) if (n - tonic) % 12 in (0, 7)]
    beat_s = rng.uniform(0.42, 0.62)
    notes: list[_Note] = []
    now = min(0.4, 0.1 * duration_s)
    degree = int(rng.choice(homes))
    while duration_s - now > 0.6:
        length = int(rng.integers(4, 10))
        for position in range(length):
            left = duration_s - 0.1 - now
            last = position == length - 1 or left < 2.5 * beat_s
            beats = rng.choice([2.0, 3.0]) if last else rng.choice([0.5, 1, 1, 1, 1.5, 2])
            stop = now + min(beats * beat_s, left)
            step = int(rng.choice([-3, -2, -1, -1, 0, 1, 1, 2, 4]))
            if not 0 <= degree + step < len(scale):
                step = -step
            degree = int(np.clip(degree + step, 0, len(scale) - 1))
            if last:
                degree = min(homes, key=lambda home: abs(home - degree))
            arch = np.sin(np.pi * (position + 1) / (length + 1))
            notes.append(
                _Note(
                    now,
                    stop,
                    float(scale[degree]),
                    str(rng.choice(["a", "a", "e", "i", "o", "u"])),
                    str(rng.choice(["", "", "m", "l", "l", "s", "sh", "f", "t", "k"])),
                    first=position == 0,
                    gain=float(0.55 + 0.45 * arch * rng.uniform(0.8, 1.0)),
                )
            )
            now = stop
            if last:
                break
        now += rng.uniform(0.3, 2.0)
    return notes


def _perform(
    voice: FormantVoice, notes: list[_Note], duration_s: float, rng: np.random.Generator
) -> _Controls:
    """Turn notes into control curves: glides, vibrato, drift, vowels and breath."""
    n = int(np.ceil(duration_s * _CONTROL_HZ)) + 2
    t = np.arange(n) / _CONTROL_HZ
    pitch = np.full(n, notes[0].semitone)
    depth = np.zeros(n)
    voicing, breath, loudness = np.zeros(n), np.zeros(n), np.full(n, notes[0].gain)
    formants = np.tile(_formants(voice, notes[0].vowel), (n, 1))
    for i, note in enumerate(notes):
        since = t - note.start_s
        sounding = (since >= 0) & (t < note.stop_s)
        onset_s = _onset_s(note)
        if note.first:
            pitch[since >= -0.3] = note.semitone
            pitch -= 1.2 * np.where(since >= 0, np.exp(-np.maximum(since, 0) / 0.07), 0)
        else:  # a glide that ends shortly after the beat; one in four is long
            glide_s = rng.uniform(0.06, 0.14) if rng.random() < 0.75 else rng.uniform(0.2, 0.35)
            x = np.clip(since / min(glide_s, note.stop_s - note.start_s) + 0.3, 0, 1)
            pitch += (note.semitone - notes[i - 1].semitone) * x * x * (3 - 2 * x)
        depth[sounding] = np.clip((since[sounding] - 0.2) / 0.3, 0, 1)
        formants[since >= 0] = _formants(voice, note.vowel)
        loudness[since >= 0] = note.gain
        voicing[sounding & (since >= onset_s)] = 1.0
        if note.consonant in _VOICED_CONSONANTS:
            opening = sounding & (since < 0.09)
            formants[opening] = _formants(voice, note.consonant)
            voicing[opening] = 0.3
        if note.first:  # inhalation
            breath += 0.012 * np.exp(-0.5 * ((since + 0.17) / 0.06) ** 2)
    vibrato_hz = voice.vibrato_hz * (1 + 0.06 * _wander(n, 0.8, rng))
    turns = np.cumsum(vibrato_hz) / _CONTROL_HZ
    pitch += voice.vibrato_cents / 100 * _smooth(depth, 0.08) * np.sin(2 * np.pi * turns)
    pitch += 0.07 * _wander(n, 0.5, rng) + 0.03 * _wander(n, 0.06, rng)  # drift and jitter

    voicing = _smooth(voicing, 0.04) * _smooth(loudness, 0.15)
    voicing *= 1 + 0.05 * _wander(n, 0.04, rng)  # shimmer
    breath = _smooth(breath + 0.35 * voice.breathiness * voicing, 0.03)
    f0 = 440 * 2 ** ((pitch - 69) / 12)
    smooth = np.stack([_smooth(column, 0.09) for column in np.log(formants).T], axis=1)
    formants = np.exp(smooth)
    # High voices open the mouth so that the first formant stays above the pitch (Sundberg 1987).
    formants[:, 0] = np.maximum(formants[:, 0], 1.08 * f0)
    formants[:, 1] = np.maximum(formants[:, 1], 1.25 * formants[:, 0])
    return _Controls(f0, np.maximum(voicing, 0), breath, formants)


def _onset_s(note: _Note) -> float:
    """Return the delay from the start of the note to the onset of voicing."""
    if note.consonant not in _NOISES:
        return 0.0
    _, _, closure_s, noise_s, _ = _NOISES[note.consonant]
    return min(closure_s + noise_s, 0.4 * (note.stop_s - note.start_s))


def _formants(voice: FormantVoice, vowel: str) -> NDArray[np.float64]:
    """Return the formants of a vowel, (8,) in Hz."""
    upper = (1 - voice.ring) * np.array(_UPPER_FORMANTS_HZ)
    upper += voice.ring * np.array(_RINGING_FORMANTS_HZ)
    return np.concatenate([_VOWELS[vowel], upper]) * voice.formant_scale


def _wander(n: int, time_s: float, rng: np.random.Generator) -> Curve:
    """Return (n,) noise of unit deviation and a correlation time of about `time_s`."""
    sigma = time_s * _CONTROL_HZ / 2
    margin = int(4 * sigma) + 1
    noise = ndimage.gaussian_filter1d(rng.standard_normal(n + 2 * margin), sigma)
    return np.asarray(noise[margin : margin + n] * np.sqrt(2 * np.sqrt(np.pi) * sigma))


def _smooth(curve: Curve, width_s: float) -> Curve:
    """Smooth a curve, so that a step becomes a slope of about `width_s`."""
    return np.asarray(ndimage.gaussian_filter1d(curve, width_s * _CONTROL_HZ / 4, mode="nearest"))


def _sampled(curve: Curve, at: Curve) -> Curve:
    """Interpolate `curve` linearly at the fractional positions `at`."""
    return np.interp(at, np.arange(len(curve)), curve)


def _harmonics(cycles: Curve, f0: Curve, sample_rate: int) -> Curve:
    """Sum cos(2 pi k cycles) over all harmonics k up to 10 kHz; (T,).

    Closed form of the Dirichlet kernel: (sin((2n + 1) x) / sin(x) - 1) / 2 with x = pi cycles.
    """
    highest = min(_HIGHEST_HARMONIC_HZ, 0.45 * sample_rate)
    count = np.floor(highest / f0)
    x = np.pi * (cycles - np.round(cycles))  # within -pi / 2 to pi / 2, where no precision is lost
    near = np.abs(x) < 1e-6
    safe = np.where(near, 1.0, x)
    kernel = np.where(near, 2 * count + 1, np.sin((2 * count + 1) * safe) / np.sin(safe))
    return (kernel - 1) / 2


def _vocal_tract(
    voice: FormantVoice, pulses: Curve, breath: Curve, controls: _Controls, sample_rate: int
) -> Curve:
    """Filter the source through glottis, mouth and lips by overlap-add; (T,).

    Hann windows of two hops sum to one. Every stretch is convolved with the response at its middle;
    the transform leaves six hops (70 ms) for the response to decay.
    """
    hop = 2 ** round(np.log2(0.0116 * sample_rate))
    n_fft = 8 * hop
    n_frames = len(pulses) // hop + 2
    window = np.hanning(2 * hop + 1)[:-1]
    hz = np.arange(n_fft // 2 + 1) * sample_rate / n_fft
    audible = int(np.searchsorted(hz, 1.1 * _HIGHEST_HARMONIC_HZ))
    above = _higher_poles(hz[:audible], voice.formant_scale)
    middle = np.arange(n_frames) * hop * _CONTROL_HZ / sample_rate  # frame i starts one hop earlier
    f0 = _sampled(controls.f0, middle)
    formants = np.stack([_sampled(column, middle) for column in controls.formants.T], axis=1)

    def stretches(source: Curve, block: slice) -> NDArray[np.complex64]:
        padded = np.zeros((block.stop - block.start + 1) * hop)
        first = (block.start - 1) * hop
        taken = source[max(0, first) : first + len(padded)]
        padded[max(0, -first) :][: len(taken)] = taken
        frames = np.lib.stride_tricks.sliding_window_view(padded, 2 * hop)[::hop]
        spectrum = fft.rfft((frames * window).astype(np.float32), n_fft)
        return np.asarray(spectrum[:, :audible])

    out = np.zeros((n_frames + 8, hop))
    for start in range(0, n_frames, _BLOCK_FRAMES):
        block = slice(start, min(start + _BLOCK_FRAMES, n_frames))
        spectrum = stretches(pulses, block) * _glottis(voice, hz[:audible], f0[block])
        spectrum += stretches(breath, block)
        spectrum *= _resonances(hz[:audible], formants[block]) * above
        rung = fft.irfft(spectrum, n_fft).reshape(-1, 8, hop)
        for shift in range(8):
            out[block.start + shift : block.stop + shift] += rung[:, shift]
    return out.reshape(-1)[hop : hop + len(pulses)]


def _glottis(
    voice: FormantVoice, hz: NDArray[np.float64], f0: NDArray[np.float64]
) -> NDArray[np.complex64]:
    """Return spectra (F, bins) of the derivative of one glottal pulse, s^2 - s^3 for s in 0 to 1.

    s is time divided by the open phase (open_quotient / f0), so each harmonic keeps its amplitude
    and phase when the pitch changes. With I_n the integral of s^n exp(-jxs), it is 2 I_1 - 3 I_2.
    """
    x = np.maximum(1e-2, 2 * np.pi * voice.open_quotient * hz / f0[:, None]).astype(np.float32)
    over_jx = np.asarray(-1j / x, dtype=np.complex64)
    end = np.exp(np.asarray(-1j * x, dtype=np.complex64))
    first = ((1 - end) * over_jx - end) * over_jx
    second = (2 * first - end) * over_jx
    tilt = 1 / (1 + 1j * hz / voice.tilt_hz)
    # The factor 4 brings the strongest harmonics to about 1.
    return np.asarray(4 * (2 * first - 3 * second) * tilt, dtype=np.complex64)


def _resonances(hz: NDArray[np.float64], formants: NDArray[np.float64]) -> NDArray[np.complex64]:
    """Return responses (F, bins) of second-order resonators in cascade, each 1 at 0 Hz."""
    s = (1j * hz).astype(np.complex64)
    s2 = s * s
    below = np.ones((len(formants), len(hz)), dtype=np.complex64)
    for column, bandwidth in zip(formants.T, _BANDWIDTHS_HZ, strict=True):
        squared = (column**2 + bandwidth**2 / 4).astype(np.float32)[:, None]
        below *= (s2 + np.float32(bandwidth) * s) / squared + 1
    return np.asarray(1 / below, dtype=np.complex64)


def _higher_poles(hz: NDArray[np.float64], scale: float) -> Array:
    """Return the gain (bins,) of formants above the eighth; without it the voice sounds muffled.

    Fant's correction (1960) for the poles of a tube at 8.5, 9.5, ... kHz: sums of (f / F_k)^2 and
    (f / F_k)^4 / 2 over them, as integrals; constant above 7 kHz, near the eighth formant.
    """
    khz = np.minimum(hz / (1000 * scale), 7.0)
    return np.exp(khz**2 / 8 + khz**4 / 3072).astype(np.float32)


def _add_consonants(
    wav: Curve, notes: list[_Note], sample_rate: int, rng: np.random.Generator
) -> None:
    """Add bursts and hisses to `wav`, in place, before the vowels of their notes."""
    for note in notes:
        if note.consonant not in _NOISES:
            continue
        centre, octaves, closure_s, _, level = _NOISES[note.consonant]
        start = round((note.start_s + closure_s) * sample_rate)
        length = round((_onset_s(note) - closure_s + 0.02) * sample_rate)
        length = min(length, len(wav) - start)
        if length < 64:
            continue
        spectrum = fft.rfft(rng.standard_normal(length))
        hz = np.maximum(1.0, fft.rfftfreq(length, 1 / sample_rate))
        spectrum *= np.exp(-0.5 * (np.log2(hz / centre) / octaves) ** 2)
        hiss = fft.irfft(spectrum, length)
        hiss *= level * note.gain / max(1e-9, 3 * float(hiss.std()))
        rise = 0.5 if closure_s == 0 else 0.08  # a burst starts abruptly
        shape = np.interp(np.linspace(0, 1, length), [0, rise, 0.7, 1], [0, 1, 1, 0])
        wav[start : start + length] += hiss * shape
