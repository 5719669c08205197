"""Singing of known pitch: one recording annotated by hand, and songs of the demo's singer.

Every clip is 44.1 kHz with the true f0 at samples 0, 512, 1024, ...: the annotation has a value at
every 256th sample, so every second one is used, without interpolation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy import fft, signal

from pipeline.tools.formant_singer import ALTO, SOPRANO, FormantVoice, sing
from stages.types import Array

SAMPLE_RATE = 44100
HOP_LENGTH = 512
_ANNOTATED_EVERY = 256  # samples
_PEAK = 0.5

TENOR = FormantVoice(
    name="tenor", f0_min=123.5, f0_max=392.0, formant_scale=1.05, ring=0.4, breathiness=0.15,
    vibrato_hz=5.4, vibrato_cents=45, open_quotient=0.6, tilt_hz=2400,
)  # fmt: skip
LOW_BASS = FormantVoice(
    name="low bass", f0_min=58.3, f0_max=164.8, formant_scale=0.95, ring=0.5, breathiness=0.12,
    vibrato_hz=4.8, vibrato_cents=30, open_quotient=0.5, tilt_hz=2000,
)  # fmt: skip
HIGH_SOPRANO = replace(SOPRANO, name="high soprano", f0_min=523.3, f0_max=1244.5)
BREATHY = {"breathiness": 1.0, "open_quotient": 0.9, "tilt_hz": 900.0}
GROWL = {"growl": 0.3}


@dataclass(frozen=True)
class Clip:
    wav: Array  # (T,)
    f0: Array  # (F,) the true pitch in Hz at sample i * HOP_LENGTH, 0 = unvoiced


@dataclass(frozen=True)
class Condition:
    """Clips of one kind. f0_max: upper limit for the methods, in Hz."""

    name: str
    clips: Sequence[Clip]
    f0_max: float = 1100.0


def vocadito(folder: Path) -> Condition | None:
    """Read the recording vocadito_1 and its annotation, if `folder` has them."""
    audio, notes = folder / "vocadito_1.flac", folder / "vocadito_1_f0.csv"
    if not audio.exists() or not notes.exists():
        return None
    wav, rate = sf.read(audio, dtype="float32")
    times, f0 = np.loadtxt(notes, delimiter=",").T
    if rate != SAMPLE_RATE or not np.allclose(times * rate, _ANNOTATED_EVERY * np.arange(len(f0))):
        raise SystemExit(f"{notes} is not an annotation at every {_ANNOTATED_EVERY}th sample")
    truth = f0[:: HOP_LENGTH // _ANNOTATED_EVERY][: len(wav) // HOP_LENGTH]
    return Condition("vocadito", [Clip(wav, truth.astype(np.float32))])


def generated(seconds: float) -> list[Condition]:
    """Generate every kind of song, each two clips of `seconds` in total; deterministic."""
    half = seconds / 2

    def songs(*voices: FormantVoice) -> list[Clip]:
        made = [sing(voice, half, SAMPLE_RATE, i, HOP_LENGTH) for i, voice in enumerate(voices)]
        return [Clip(song.wav, song.f0) for song in made]

    clean = songs(ALTO, TENOR)
    return [
        Condition("clean", clean),
        *(
            Condition(f"noise {snr_db} dB", [noisy(c, snr_db, i) for i, c in enumerate(clean)])
            for snr_db in (20, 10, 0)
        ),
        Condition("reverb", [reverberant(clip, i) for i, clip in enumerate(clean)]),
        Condition("high soprano", songs(HIGH_SOPRANO, HIGH_SOPRANO), f0_max=1400.0),
        Condition("low bass", songs(LOW_BASS, LOW_BASS)),
        Condition("growl", songs(replace(ALTO, **GROWL), replace(TENOR, **GROWL))),
        Condition("breathy", songs(replace(ALTO, **BREATHY), replace(TENOR, **BREATHY))),
    ]


def noisy(clip: Clip, snr_db: float, seed: int) -> Clip:
    """Add pink noise (20 Hz and up) to a clip, a number of dB below the mean power of singing."""
    spectrum = fft.rfft(np.random.default_rng(seed).standard_normal(len(clip.wav)))
    hz = fft.rfftfreq(len(clip.wav), 1 / SAMPLE_RATE)
    noise = fft.irfft(np.where(hz < 20, 0, spectrum / np.sqrt(np.maximum(hz, 20))), len(clip.wav))
    noise *= np.sqrt(sung_power(clip) / 10 ** (snr_db / 10) / np.mean(noise**2))
    return Clip(_to_peak(clip.wav + noise), clip.f0)


def sung_power(clip: Clip) -> float:
    """Return the mean square of the samples in voiced frames."""
    blocks = clip.wav[: len(clip.f0) * HOP_LENGTH].reshape(-1, HOP_LENGTH).astype(np.float64)
    return float(np.mean(blocks[clip.f0 > 0] ** 2))


def reverberant(clip: Clip, seed: int) -> Clip:
    """Add a room of 1.2 s (to -60 dB) whose echoes have half of the direct sound's power.

    Eight reflections within 60 ms, then exponentially decaying noise. The direct sound is not
    delayed, and a frame is voiced where it is sung, not where it still reverberates.
    """
    rng = np.random.default_rng(seed)
    t = np.arange(round(1.2 * SAMPLE_RATE)) / SAMPLE_RATE
    decay = 10 ** (-3 * t / 1.2)
    echoes = decay * rng.standard_normal(len(t)) * (t > 0.02)
    echoes /= np.sqrt(np.sum(echoes**2))
    early = rng.integers(round(0.005 * SAMPLE_RATE), round(0.06 * SAMPLE_RATE), 8)
    echoes[early] += rng.choice([-1, 1], 8) * decay[early] / np.sqrt(8)
    response = echoes * np.sqrt(0.5 / np.sum(echoes**2))
    response[0] = 1.0
    wet = signal.fftconvolve(clip.wav.astype(np.float64), response)[: len(clip.wav)]
    return Clip(_to_peak(wet), clip.f0)


def _to_peak(wav: np.ndarray) -> Array:
    return (wav * (_PEAK / np.abs(wav).max())).astype(np.float32)
