"""The synthetic singer, judged by pitch estimators that know nothing of it."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.tools.formant_singer import (
    ALTO,
    BASS,
    SOPRANO,
    VOICES,
    FormantSong,
    FormantVoice,
    sing,
)
from stages.f0 import F0Config, estimate_f0
from stages.slice import SliceConfig, slice_silence

RATES = (44100, 48000, 22050)
voices = pytest.mark.parametrize("voice", VOICES, ids=lambda voice: voice.name)


def cents_off(sung: FormantSong, method: str) -> tuple[np.ndarray, float]:
    """Signed error where both say voiced, and the part of the truly voiced frames found."""
    cfg = F0Config(method=method, hop_length=sung.hop_length, f0_max=900)  # type: ignore[arg-type]
    found = estimate_f0(sung.wav, sung.sample_rate, cfg)
    both = (found > 0) & (sung.f0 > 0)
    return 1200 * np.log2(found[both] / sung.f0[both]), both.sum() / (sung.f0 > 0).sum()


@pytest.mark.slow
@voices
@pytest.mark.parametrize("method", ["praat", "dio"])
@pytest.mark.parametrize("sample_rate", RATES)
def test_the_stated_f0_is_the_f0_of_the_sound(
    voice: FormantVoice, method: str, sample_rate: int
) -> None:
    cents, recall = cents_off(sing(voice, 15.0, sample_rate, seed=1), method)
    assert np.mean(np.abs(cents) < 50) >= 0.97
    assert abs(np.median(cents)) < 2, "a constant bias: the truth is early, late or transposed"
    assert recall > 0.95


def test_a_contour_that_is_wrong_by_a_semitone_or_late_by_50_ms_is_noticed() -> None:
    sung = sing(BASS, 15.0, 44100, seed=1)
    late = FormantSong(sung.wav, np.roll(sung.f0, 4), sung.sample_rate, sung.hop_length)
    sharp = FormantSong(
        sung.wav, sung.f0 * np.float32(2 ** (1 / 12)), sung.sample_rate, sung.hop_length
    )
    for wrong in (late, sharp):
        cents, _ = cents_off(wrong, "praat")
        assert np.mean(np.abs(cents) < 50) < 0.97


@pytest.mark.slow
@voices
def test_notes_stay_in_the_range_of_the_voice_and_use_it(voice: FormantVoice) -> None:
    f0 = np.concatenate([sing(voice, 20.0, 22050, seed=seed).f0 for seed in range(4)])
    voiced = f0[f0 > 0]
    assert voice.f0_min * 0.9 < voiced.min() and voiced.max() < voice.f0_max * 1.1
    assert voiced.max() / voiced.min() > 1.5
    assert 0.5 < len(voiced) / len(f0) < 0.95


def test_there_is_vibrato_at_its_rate() -> None:
    sung = sing(SOPRANO, 30.0, 44100, seed=2, hop_length=441)
    cents = 1200 * np.log2(np.where(sung.f0 > 0, sung.f0, 1))
    length = 100  # 1 s at 100 frames a second: bins of 1 Hz
    windows = np.lib.stride_tricks.sliding_window_view(cents, length)
    steady = windows[(windows > 0).all(axis=1) & (np.ptp(windows, axis=1) < 200)]
    assert len(steady) > 20
    centred = steady - steady.mean(axis=1, keepdims=True)
    power = (np.abs(np.fft.rfft(centred * np.hanning(length), axis=1)) ** 2).mean(axis=0)
    assert np.argmax(power[3:12]) + 3 == round(SOPRANO.vibrato_hz)


@voices
def test_rests_are_where_a_song_can_be_cut(voice: FormantVoice) -> None:
    wav = sing(voice, 40.0, 44100, seed=3).wav
    cfg = SliceConfig(max_length_ms=None, max_silence_kept_ms=200)
    spans = [span for span in slice_silence(wav, 44100, cfg) if span.stop > span.start]
    assert sum(not span.silent for span in spans) >= 3
    silent = np.concatenate([wav[span.start : span.stop] for span in spans if span.silent])
    assert len(silent) > 44100
    assert -80 < 10 * np.log10(np.mean(silent.astype(float) ** 2)) < -50, "neither dead nor loud"


def test_it_is_a_voice_and_not_a_buzzer() -> None:
    """Formants move the spectral centre between vowels; breath and consonants add noise."""
    sung = sing(ALTO, 20.0, 44100, seed=0)
    frames = np.lib.stride_tricks.sliding_window_view(sung.wav, 2048)[::512][: len(sung.f0)]
    power = np.abs(np.fft.rfft(frames * np.hanning(2048).astype(np.float32), axis=1)) ** 2
    hz = np.fft.rfftfreq(2048, 1 / 44100)
    voiced = sung.f0[: len(power)] > 0
    loud = power.sum(axis=1) > 1e-3 * power.sum(axis=1).max()
    centre = (power @ hz / power.sum(axis=1))[voiced & loud]
    assert np.percentile(centre, 90) > 1.4 * np.percentile(centre, 10)
    consonants = power[~voiced & loud]
    assert len(consonants) > 5
    assert (consonants[:, hz > 1500].sum(axis=1) > 0.5 * consonants.sum(axis=1)).mean() > 0.4
    # Nothing folds back from above the highest harmonic: only the noise of the room lies there.
    above = power[:, hz > 14000].sum(axis=1)
    silent = power.sum(axis=1) < 1e-5 * power.sum(axis=1).max()
    assert np.median(above[voiced & loud]) < 1.3 * np.median(above[silent])


def test_same_arguments_same_samples_other_seed_other_song() -> None:
    one, same, other = (sing(ALTO, 5.0, 48000, seed=seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(one.wav, same.wav)
    np.testing.assert_array_equal(one.f0, same.f0)
    assert not np.array_equal(one.f0, other.f0)


@pytest.mark.parametrize("sample_rate", [8000, 22050, 44100, 96000])
@pytest.mark.parametrize("hop_length", [160, 512])
@pytest.mark.parametrize("duration_s", [1.0, 2.345, 6.0])
def test_shapes_and_levels(sample_rate: int, hop_length: int, duration_s: float) -> None:
    sung = sing(SOPRANO, duration_s, sample_rate, seed=4, hop_length=hop_length)
    assert sung.wav.shape == (round(duration_s * sample_rate),)
    assert sung.f0.shape == (len(sung.wav) // hop_length,)
    assert sung.wav.dtype == sung.f0.dtype == np.float32
    assert np.isfinite(sung.wav).all() and 0.4 < np.abs(sung.wav).max() < 0.7
    assert (sung.f0 > 0).any() and (sung.f0 == 0).any()


def test_what_cannot_be_sung_is_refused() -> None:
    with pytest.raises(ValueError, match=r"duration_s is .*; it must be 1 or more"):
        sing(BASS, 0.5, 44100, seed=0)
    with pytest.raises(ValueError, match="8000 Hz"):
        sing(BASS, 2.0, 4000, seed=0)
    with pytest.raises(ValueError, match="f0_min and f0_max"):
        FormantVoice(name="x", f0_min=200, f0_max=210)
    with pytest.raises(ValueError, match="breathiness"):
        FormantVoice(name="x", f0_min=100, f0_max=300, breathiness=2)
