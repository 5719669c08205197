"""Measures of a clip's quality, on signals whose faults are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.quality import AUDIO_MEASURES, measure_quality
from stages.types import Array

RATE = 44100
CLEAN = [
    "singing-female.flac",
    "vignesh.flac",
    "soprano-E4.flac",
    "speech-female.flac",
    "speech-male.flac",
    "carnatic.flac",
]


def quality(wav: Array, sample_rate: int = RATE) -> dict[str, float]:
    return measure_quality(wav.astype(np.float32), sample_rate)


def quantised(wav: Array, gain: float = 1.0) -> Array:
    """Apply a gain and round to 16 bits, as before this stage."""
    return (np.clip(np.round(wav * gain * 32768), -32768, 32767) / 32768).astype(np.float32)


def recording(folder: Path, name: str) -> Array:
    wav, rate = soundfile.read(folder / name, dtype="float32")
    assert rate == RATE
    return quantised(wav, 0.7 / float(np.abs(wav).max()))


def sine(hz: float, seconds: float = 1.0) -> Array:
    return np.sin(2 * np.pi * hz / RATE * np.arange(int(seconds * RATE))).astype(np.float32)


# Any finite input


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.one_of(st.integers(1, 40), st.integers(1, 20000)),
    sample_rate=st.sampled_from([8000, 16000, 44100, 192000]),
    level=st.sampled_from([0.0, 1e-30, 1e-4, 1.0]),
    kind=st.sampled_from(["noise", "constant", "square", "click"]),
    seed=st.integers(0, 99),
)
def test_every_measure_is_finite(
    num_samples: int, sample_rate: int, level: float, kind: str, seed: int
) -> None:
    wav = {
        "noise": np.random.default_rng(seed).uniform(-1, 1, num_samples),
        "constant": np.ones(num_samples),
        "square": np.sign(np.sin(np.arange(num_samples) / 20)),
        "click": np.eye(1, num_samples)[0],
    }[kind] * level
    measured = quality(wav.astype(np.float32), sample_rate)
    assert all(isinstance(v, float) and math.isfinite(v) for v in measured.values())
    for ratio in (measured["clipping_ratio"], measured["silence_ratio"]):
        assert 0 <= ratio <= 1
    assert -20 <= measured["snr_db"] <= 100
    assert 0 <= measured["bandwidth_hz"] <= sample_rate / 2


def test_silence() -> None:
    measured = quality(np.zeros(RATE, np.float32))
    assert measured.pop("silence_ratio") == 1
    assert set(measured.values()) == {0.0}


def test_only_the_measures_that_are_wanted_are_made() -> None:
    wav = sine(440)
    assert measure_quality(wav, RATE, ["snr_db"]) == {"snr_db": quality(wav)["snr_db"]}
    assert list(quality(wav)) == [measure.name for measure in AUDIO_MEASURES]


# Clipping


@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.parametrize("gain", [1.0, 0.03])
def test_recordings_that_do_not_clip(name: str, gain: float, real_audio: Path) -> None:
    wav = recording(real_audio, name)
    assert quality(quantised(wav, gain))["clipping_ratio"] < 2e-4


@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.parametrize("share", [0.002, 0.01, 0.05])
def test_recordings_that_clipped_and_were_turned_down(
    name: str, share: float, real_audio: Path
) -> None:
    wav = recording(real_audio, name)
    wav = quantised(wav, 1 / float(np.quantile(np.abs(wav), 1 - share)))
    measured = quality(quantised(wav, 0.37))["clipping_ratio"]
    assert 0.5 * share < measured < 1.1 * share


@pytest.mark.parametrize("name", CLEAN)
def test_recordings_that_clipped_and_were_resampled(name: str, real_audio: Path) -> None:
    wav = soxr.resample(recording(real_audio, name), RATE, 48000, "VHQ")
    wav = quantised(wav, 1 / float(np.quantile(np.abs(wav), 0.98)))
    wav = soxr.resample(wav, 48000, RATE, "VHQ")
    assert 0.3 * 0.02 < quality(quantised(wav, 0.37))["clipping_ratio"] < 1.1 * 0.02


@pytest.mark.parametrize("hz", [60, 100, 200, 440, 1000, 5000])
@pytest.mark.parametrize("gain", [0.9, 0.01])
def test_a_sine_is_round(hz: float, gain: float) -> None:
    assert quality(quantised(sine(hz), gain))["clipping_ratio"] == 0


@pytest.mark.parametrize("hz", [60, 200, 440])
@pytest.mark.parametrize("top", [0.5, 0.9])
def test_a_clipped_sine(hz: float, top: float) -> None:
    clipped = quantised(np.clip(sine(hz), -top, top), 0.4)
    share = 2 * math.acos(top) / math.pi
    assert quality(clipped)["clipping_ratio"] == pytest.approx(share, rel=0.05)


def test_clipping_on_one_side() -> None:
    clipped = quantised(np.minimum(sine(200), 0.9), 0.4)
    share = math.acos(0.9) / math.pi
    assert quality(clipped)["clipping_ratio"] == pytest.approx(share, rel=0.05)


# Silence, noise, bandwidth


@pytest.mark.parametrize("gain", [0.5, 0.01])
def test_silence_ratio(gain: float) -> None:
    """A third of the clip lies 60 dB below the rest, at any level; a tenth of it 20 dB below."""
    wav = sine(300, 3.0)
    wav[: RATE // 10 * 10] *= 1e-3
    wav[-RATE * 3 // 10 :] *= 0.1
    assert quality(wav * np.float32(gain))["silence_ratio"] == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("gain", [1.0, 0.05])
@pytest.mark.parametrize("snr_db", [5.0, 15.0, 25.0])
@pytest.mark.parametrize("name", ["singing-female.flac", "soprano-E4.flac", "speech-female.flac"])
def test_snr_of_recordings_with_noise(
    name: str, snr_db: float, gain: float, real_audio: Path
) -> None:
    """One is a single sustained note, one has pauses: the estimate holds for both."""
    wav = recording(real_audio, name)
    noise = np.random.default_rng(0).normal(size=len(wav)) * wav.std() * 10 ** (-snr_db / 20)
    noisy = ((wav + noise) * gain).astype(np.float32)
    assert quality(noisy)["snr_db"] == pytest.approx(snr_db, abs=2.5)


def test_recordings_as_they_are_have_little_noise(real_audio: Path) -> None:
    for name in ("singing-female.flac", "vignesh.flac", "soprano-E4.flac", "speech-female.flac"):
        assert quality(recording(real_audio, name))["snr_db"] > 28


def test_snr_of_noise_alone_and_of_a_tone_alone() -> None:
    noise = np.random.default_rng(0).normal(size=5 * RATE) * 0.1
    assert quality(noise.astype(np.float32))["snr_db"] < -5
    assert quality(0.5 * sine(440, 5.0))["snr_db"] > 60


@pytest.mark.parametrize("edge_hz", [2000, 4000, 8000, 16000])
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_bandwidth_of_filtered_noise(edge_hz: int, offset: float) -> None:
    """White noise up to `edge_hz` holds 99 % of its energy below 0.99 of it, whatever its mean."""
    spectrum = np.fft.rfft(np.random.default_rng(0).normal(size=5 * RATE) * 0.1)
    spectrum[edge_hz * 5 :] = 0
    wav = np.fft.irfft(spectrum) + offset
    assert quality(wav.astype(np.float32))["bandwidth_hz"] == pytest.approx(
        0.99 * edge_hz, rel=0.02
    )


# Crest factor


@pytest.mark.parametrize("gain", [1.0, 0.01, 1e-30])
def test_the_crest_factor_of_known_signals(gain: float) -> None:
    square = np.sign(sine(100)) * np.float32(gain)
    assert quality(sine(440) * np.float32(gain))["crest_db"] == pytest.approx(3.01, abs=0.01)
    assert quality(square[1:-1])["crest_db"] == pytest.approx(0, abs=0.1)
    click = np.eye(1, 10000, 5000)[0] * gain
    assert quality(click)["crest_db"] == pytest.approx(40, abs=1e-6)


def test_a_limiter_lowers_the_crest_factor(real_audio: Path) -> None:
    wav = recording(real_audio, "singing-female.flac")
    limited = np.tanh(wav * 10) / 10
    assert quality(wav)["crest_db"] > quality(limited)["crest_db"] + 6


# DC offset


@pytest.mark.parametrize("offset", [0.1, -0.1])
@pytest.mark.parametrize("gain", [1.0, 0.01, 1e-30])
def test_the_dc_offset_is_a_share_of_the_peak(offset: float, gain: float) -> None:
    wav = (0.4 * sine(441) + offset) * gain
    assert quality(wav)["dc_offset"] == pytest.approx(0.1 / 0.5, rel=1e-3)
    assert quality(sine(441))["dc_offset"] == pytest.approx(0, abs=1e-6)


def test_recordings_have_little_dc_offset(real_audio: Path) -> None:
    for name in CLEAN:
        assert quality(recording(real_audio, name))["dc_offset"] < 0.01
