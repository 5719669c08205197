"""Loudness against pyloudnorm, true peaks against whole-song interpolation, gains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import pyloudnorm
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.loudness import (
    HALF_TAPS,
    PEAK_BLOCK_SAMPLES,
    LoudnessConfig,
    apply_gain,
    integrated_loudness,
    measure_loudness,
    peaks,
)
from stages.types import Array, PcmFile


def sine(
    seconds: float, hz: float = 997.0, amplitude: float = 0.5, sample_rate: int = 48000
) -> Array:
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    return (amplitude * np.sin(2 * np.pi * hz * time)).astype(np.float32)


@st.composite
def songs(draw: st.DrawFn) -> tuple[Array, int]:
    """Noise in stretches of many levels, around the gates and digital silence among them."""
    sample_rate = draw(st.sampled_from([8000, 11025, 16000, 22050, 44099, 44100, 48000]))
    noise = np.random.default_rng(draw(st.integers(0, 9)))
    stretches = draw(
        st.lists(
            st.tuples(
                st.sampled_from([0.0, 3e-4, 1e-2, 0.1, 0.5]), st.integers(1, 2 * sample_rate)
            ),
            min_size=1,
            max_size=5,
        )
    )
    parts = [level * noise.standard_normal(n) for level, n in stretches]
    return np.concatenate(parts).astype(np.float32), sample_rate


@settings(deadline=None, max_examples=100)
@given(song=songs())
def test_loudness_is_pyloudnorms(song: tuple[Array, int]) -> None:
    wav, sample_rate = song
    loudness = integrated_loudness(wav, sample_rate)
    if len(wav) < 0.4 * sample_rate:
        assert math.isnan(loudness)
        return
    # In float64: pyloudnorm rounds to its input's type between the two filters.
    expected = pyloudnorm.Meter(sample_rate).integrated_loudness(wav.astype(np.float64))
    if expected == -math.inf:
        assert math.isnan(loudness)
    else:
        assert loudness == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(song=songs(), read_steps=st.integers(1, 50))
def test_blocks_do_not_change_a_bit_of_loudness(song: tuple[Array, int], read_steps: int) -> None:
    whole = integrated_loudness(*song, read_steps=1 << 20)
    np.testing.assert_equal(integrated_loudness(*song, read_steps=read_steps), whole)


@pytest.mark.parametrize("name", ["vocadito_1.flac", "karissa_hobbs.ogg", "speech-male.flac"])
def test_real_recordings(real_audio: Path, name: str) -> None:
    wav, sample_rate = soundfile.read(real_audio / name, dtype="float32", always_2d=True)
    wav = wav.mean(axis=1)
    reading = measure_loudness(wav, sample_rate, LoudnessConfig())
    expected = pyloudnorm.Meter(sample_rate).integrated_loudness(wav.astype(np.float64))
    assert reading.loudness_lufs == pytest.approx(expected, abs=1e-6)
    assert 10 ** (reading.peak_db / 20) == pytest.approx(true_peak_of_whole(wav), rel=1e-12)


def test_a_full_scale_sine_reads_as_the_standard_says() -> None:
    """EBU Tech 3341, case 1 for one channel: 0 dBFS at 997 Hz is -3.01 LUFS."""
    assert integrated_loudness(sine(5, amplitude=1.0), 48000) == pytest.approx(-3.01, abs=0.05)


def test_quiet_stretches_are_gated() -> None:
    loud, quiet = sine(10), sine(10, amplitude=0.01)
    mixed = integrated_loudness(np.concatenate([loud, quiet]), 48000)
    assert mixed == pytest.approx(integrated_loudness(loud, 48000), abs=0.1)


def true_peak_of_whole(wav: Array) -> float:
    """The interpolation written out: every point of the song and a margin, from the definition."""
    padded = np.pad(wav.astype(np.float64), 2 * HALF_TAPS)
    highest = np.abs(padded).max()
    for fraction in (0.25, 0.5, 0.75):
        offsets = np.arange(-HALF_TAPS + 1, HALF_TAPS + 1)
        taps = np.sinc(fraction - offsets)
        taps *= np.i0(3.4 * np.sqrt(1 - ((fraction - offsets) / HALF_TAPS) ** 2))
        taps /= taps.sum()
        highest = max(highest, np.abs(np.convolve(padded, taps[::-1])).max())
    return float(highest)


@settings(deadline=None, max_examples=100)
@given(
    num_samples=st.integers(1, 4 * PEAK_BLOCK_SAMPLES),
    burst_at=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_no_peak_is_missed(num_samples: int, burst_at: float, seed: int) -> None:
    """A short burst of high frequencies, also across block borders and at the song's ends."""
    rng = np.random.default_rng(seed)
    wav = rng.uniform(-0.5, 0.5, num_samples)
    burst = slice(int(burst_at * num_samples), int(burst_at * num_samples) + rng.integers(1, 30))
    wav[burst] = 0.9 * np.sign(rng.standard_normal(len(wav[burst])))
    wav = wav.astype(np.float32)
    sample_peak, true_peak = peaks(wav)
    assert sample_peak == np.abs(wav).max()
    assert true_peak == pytest.approx(true_peak_of_whole(wav), rel=1e-12)


@pytest.mark.parametrize("offset", range(-3, 4))
@pytest.mark.parametrize(
    "amplitudes", [(0.3, 0.3), (0.3, 0.15), (0.1, 0.3), (0.0, 0.3), (0.3, 0.0)]
)
def test_the_highest_point_hides_among_low_samples(
    offset: int, amplitudes: tuple[float, float]
) -> None:
    """The worst input for the filter, at a border of two blocks, below a louder smooth passage."""
    border = 3 * PEAK_BLOCK_SAMPLES - HALF_TAPS
    n = np.arange(-HALF_TAPS + 1, HALF_TAPS + 1) + border + offset
    wav = np.zeros(8 * PEAK_BLOCK_SAMPLES, np.float32)
    wav[n] = np.where(n < border, *amplitudes) * np.sign(np.sinc(border + offset + 0.5 - n))
    highest = true_peak_of_whole(wav)
    wav[6 * PEAK_BLOCK_SAMPLES :][:1001] = 0.99 * highest * np.hanning(1001)
    assert peaks(wav)[1] == pytest.approx(highest, rel=1e-12)


def test_blocks_that_cannot_matter_are_not_read_again() -> None:
    class Counted:
        reads = 0

        def __len__(self) -> int:
            return len(wav)

        def __getitem__(self, span: slice, /) -> Array:
            self.reads += len(wav[span])
            return wav[span]

    wav = np.full(200 * PEAK_BLOCK_SAMPLES, 0.1, np.float32)
    wav[5000] = 0.9
    counted = Counted()
    peaks(counted)
    assert counted.reads < len(wav) + 5 * PEAK_BLOCK_SAMPLES


@pytest.mark.parametrize("block", [0, 1, 300])
def test_peak_between_samples(block: int) -> None:
    """A quarter-rate sine sampled at 45 degrees: samples reach 0.707, the wave 1.0."""
    n = np.arange(400)
    burst = np.sin(np.pi / 2 * n + np.pi / 4) * np.hanning(400)
    wav = np.zeros(block * PEAK_BLOCK_SAMPLES + 1200)
    wav[block * PEAK_BLOCK_SAMPLES + 400 :][:400] = burst
    sample_peak, true_peak = peaks(wav.astype(np.float32))
    assert sample_peak == pytest.approx(math.sqrt(0.5), rel=1e-3)
    assert true_peak == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("hz", [100.0, 5000.0, 12000.0, 20000.0])
def test_interpolation_is_within_its_stated_ripple(hz: float) -> None:
    """0.15 dB above, and 0.15 dB plus the grid's own loss cos(pi f / 4 f_s) below."""
    wav = sine(1.0, hz=hz + 0.37, amplitude=1.0, sample_rate=44100) * np.hanning(44100)
    _, true_peak = peaks(wav.astype(np.float32))
    loss_db = -20 * math.log10(math.cos(math.pi * hz / 44100 / 4))
    assert -0.15 - loss_db <= 20 * math.log10(true_peak) <= 0.15


def test_a_file_reads_like_an_array(tmp_path: Path) -> None:
    wav = np.concatenate([sine(2), np.zeros(1000, np.float32), sine(7, amplitude=0.8)])
    wav.astype("<f4").tofile(tmp_path / "song.pcm")
    file = PcmFile(tmp_path / "song.pcm", len(wav))
    assert measure_loudness(file, 48000, LoudnessConfig()) == measure_loudness(
        wav, 48000, LoudnessConfig()
    )


def test_gain_reaches_the_target() -> None:
    wav = sine(3, amplitude=0.02)
    reading = measure_loudness(wav, 48000, LoudnessConfig(target_lufs=-18.0))
    louder = measure_loudness(apply_gain(wav, reading.gain_db), 48000, LoudnessConfig())
    assert louder.loudness_lufs == pytest.approx(-18.0, abs=1e-4)
    assert reading.note == ""


def test_gain_is_lowered_for_the_true_peak() -> None:
    wav = sine(3, amplitude=0.02)
    wav[70000] = 0.5
    reading = measure_loudness(wav, 48000, LoudnessConfig(target_lufs=-18.0, true_peak_db=-2.0))
    assert reading.gain_db == pytest.approx(-2.0 - reading.peak_db)
    louder = measure_loudness(apply_gain(wav, reading.gain_db), 48000, LoudnessConfig())
    assert louder.peak_db == pytest.approx(-2.0, abs=1e-5)
    assert louder.loudness_lufs < -18.0


def test_peak_mode_brings_the_largest_sample_to_one() -> None:
    wav = sine(1, amplitude=0.123)
    reading = measure_loudness(wav, 48000, LoudnessConfig(mode="peak"))
    assert np.abs(apply_gain(wav, reading.gain_db)).max() == 1.0
    assert reading.loudness_lufs == integrated_loudness(wav, 48000)


def test_off_measures_and_changes_nothing() -> None:
    wav = sine(1)
    reading = measure_loudness(wav, 48000, LoudnessConfig(mode="none"))
    assert reading.gain_db == 0.0
    assert reading.loudness_lufs == integrated_loudness(wav, 48000)
    np.testing.assert_array_equal(apply_gain(wav, reading.gain_db), wav)


@pytest.mark.parametrize("mode", ["lufs", "peak", "none"])
@pytest.mark.parametrize("num_samples", [0, 1, 100, 19199, 48000])
def test_digital_silence_keeps_its_level(
    mode: Literal["lufs", "peak", "none"], num_samples: int
) -> None:
    reading = measure_loudness(np.zeros(num_samples, np.float32), 48000, LoudnessConfig(mode=mode))
    assert math.isnan(reading.loudness_lufs)
    assert (reading.peak_db, reading.gain_db) == (-math.inf, 0.0)
    assert ("silent" if num_samples == 48000 else "too short") in reading.note


def test_what_is_too_short_or_too_quiet_keeps_its_level() -> None:
    short = measure_loudness(sine(0.3), 48000, LoudnessConfig())
    assert (math.isnan(short.loudness_lufs), short.gain_db) == (True, 0.0)
    assert short.note == "no loudness reading: 0.300 s is too short"
    assert short.peak_db == pytest.approx(20 * math.log10(0.5), abs=0.15)
    quiet = measure_loudness(sine(3, amplitude=1e-4), 48000, LoudnessConfig())
    assert (math.isnan(quiet.loudness_lufs), quiet.gain_db) == (True, 0.0)
    assert "silent" in quiet.note


def test_shortest_reading() -> None:
    assert math.isfinite(integrated_loudness(sine(0.4), 48000))


@pytest.mark.parametrize("key", ["target_lufs", "true_peak_db"])
@pytest.mark.parametrize("value", [0.1, -71.0, math.nan, math.inf])
def test_settings_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"loudness.{key}"):
        LoudnessConfig(**{key: value})  # type: ignore[arg-type]
