"""Measures of a clip's pitch, on contours and mixtures whose faults are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.signal import fftconvolve

from pipeline.tools.formant_singer import VOICES, FormantVoice, sing
from stages.f0 import F0Config, estimate_f0
from stages.quality import PITCH_MEASURES, measure_pitch
from stages.quality.pitch import octave_jumps
from stages.quality.second_voice import EARLIER_RULES, second_voice, suspects
from stages.types import Array

RATE = 44100
HOP = 512
SOLO = [
    "vocadito_1.flac",
    "singing-female.flac",
    "vignesh.flac",
    "soprano-E4.flac",
    "speech-female.flac",
    "speech-male.flac",
]


def contour(*values: float) -> Array:
    return np.array(values, dtype=np.float32)


def noise(seconds: float, level: float = 0.1) -> Array:
    rng = np.random.default_rng(0)
    return rng.normal(size=int(seconds * RATE), scale=level).astype(np.float32)


# Any finite input


@settings(max_examples=60, deadline=None)
@given(
    f0=st.lists(st.one_of(st.just(0.0), st.floats(30, 4000, width=32)), max_size=80),
    num_samples=st.one_of(st.integers(1, 40), st.integers(1, 30000)),
    sample_rate=st.sampled_from([8000, 16000, 44100, 192000]),
    hop_length=st.sampled_from([64, 512, 4096]),
    level=st.sampled_from([0.0, 1e-30, 1e-4, 1.0]),
)
def test_every_measure_is_finite(
    f0: list[float], num_samples: int, sample_rate: int, hop_length: int, level: float
) -> None:
    wav = (np.random.default_rng(0).uniform(-1, 1, num_samples) * level).astype(np.float32)
    measured = measure_pitch(wav, sample_rate, contour(*f0), hop_length)
    assert all(isinstance(v, float) and math.isfinite(v) for v in measured.values())
    assert 0 <= measured["voiced_ratio"] <= 1
    assert 0 <= measured["second_voice"] < 1
    assert measured["octave_jump_rate"] >= 0
    assert 0 <= measured["f0_low_hz"] <= measured["f0_high_hz"]
    assert measured["range_semitones"] >= 0


@pytest.mark.parametrize("f0", [contour(), contour(0, 0, 0)])
def test_without_a_voiced_frame_all_is_0(f0: Array) -> None:
    measured = measure_pitch(noise(0.1), RATE, f0, HOP)
    assert measured == {measure.name: 0.0 for measure in PITCH_MEASURES}
    assert measured["range_semitones"] == 0


# Voicing, range, octave jumps


def test_voiced_ratio_and_range() -> None:
    f0 = np.concatenate([np.zeros(101), np.linspace(200, 400, 101)]).astype(np.float32)
    measured = measure_pitch(noise(3.0), RATE, f0, HOP)
    assert measured["voiced_ratio"] == 0.5
    assert measured["f0_low_hz"] == pytest.approx(210)
    assert measured["f0_high_hz"] == pytest.approx(390)
    assert measured["range_semitones"] == pytest.approx(12 * math.log2(390 / 210))


def test_a_few_stray_frames_do_not_widen_the_range() -> None:
    f0 = np.full(100, 220, dtype=np.float32)
    f0[:4] = 55
    f0[-4:] = 1000
    measured = measure_pitch(noise(2.0), RATE, f0, HOP)
    assert measured["f0_low_hz"] == measured["f0_high_hz"] == 220


@pytest.mark.parametrize(
    "f0, jumps",
    [
        (contour(200, 200, 400, 400), 1),
        (contour(200, 400, 200, 200), 2),
        (contour(600, 600, 200, 200), 1),  # a twelfth
        (contour(200, 300, 200), 0),  # a fifth
        (contour(200, 240, 290, 350, 400), 0),  # a glide
        (contour(200, 0, 400), 0),  # a new note
        (contour(200), 0),
        (contour(), 0),
    ],
)
def test_octave_jumps(f0: Array, jumps: int) -> None:
    assert octave_jumps(f0) == jumps


def test_the_jump_rate_is_per_second_of_voice() -> None:
    """Four slips up and back in one voiced second and one silent one."""
    frames = RATE // 441
    f0 = np.full(2 * frames, 200, dtype=np.float32)
    f0[frames:] = 0
    f0[20:100:20] = 400
    measured = measure_pitch(noise(2.0), RATE, f0, 441)
    assert measured["octave_jump_rate"] == pytest.approx(8)


def test_real_singing_does_not_jump(real_audio: Path) -> None:
    truth = np.loadtxt(real_audio / "vocadito_1_f0.csv", delimiter=",")[:, 1]
    assert octave_jumps(truth.astype(np.float32)) == 0


# A second voice


def vowel(f0_hz: float, seconds: float = 3.0, vibrato_hz: float = 5.5) -> NDArray[np.float64]:
    """A sung tone with vibrato of 40 cents and partials that fall by 6 dB an octave; RMS 0.1."""
    time = np.arange(int(seconds * RATE)) / RATE
    f0 = f0_hz * 2 ** (40 / 1200 * np.sin(2 * np.pi * vibrato_hz * time))
    phase = 2 * np.pi * np.cumsum(f0) / RATE
    wav = sum(np.sin(k * phase) / k for k in range(1, 13))
    return 0.1 * wav / np.std(wav)


def suspicion(wav: NDArray[np.floating], sample_rate: int = RATE) -> float:
    wav = wav.astype(np.float32)
    f0 = estimate_f0(wav, sample_rate, F0Config(method="praat"))
    return second_voice(wav, sample_rate, f0, HOP)


@pytest.mark.parametrize("semitones", [-7.5, -3, 2.5, 4, 9])
@pytest.mark.parametrize("db", [0, -12])
def test_a_second_sung_tone(semitones: float, db: float) -> None:
    first = vowel(260)
    assert suspicion(first) == 0
    second = vowel(260 * 2 ** (semitones / 12), vibrato_hz=4.7) * 10 ** (db / 20)
    assert suspicion(first + second) > 0.5


def test_the_share_of_the_clip_in_which_it_sounds() -> None:
    """share / (share + 0.16): a click or a syllable is not enough."""
    first, second = vowel(260, 8.0), vowel(350, 8.0, vibrato_hz=4.7)
    by_share = []
    for share in (0.02, 0.2, 0.5, 1.0):
        second_part = second.copy()
        second_part[int(share * len(second)) :] = 0
        by_share.append(suspicion(first + second_part))
    np.testing.assert_allclose(by_share, [0.11, 0.55, 0.76, 0.86], atol=0.1)
    assert by_share == sorted(by_share)


@pytest.mark.parametrize("gain", [1e-3, 1.0])
def test_the_level_does_not_matter(gain: float) -> None:
    duet = vowel(260) + vowel(350)
    assert suspicion(duet * gain) == pytest.approx(suspicion(duet), abs=1e-6)


def test_an_octave_error_of_the_estimator_is_no_second_voice() -> None:
    wav = vowel(260).astype(np.float32)
    f0 = estimate_f0(wav, RATE, F0Config(method="praat"))
    for ratio in (0.5, 2, 3):
        assert second_voice(wav, RATE, f0 * np.float32(ratio), HOP) < 0.1


def test_unlike_clips_in_one_call_or_apart() -> None:
    """More frames than are looked at at once: the same suspicion."""
    wav = np.tile((vowel(260) + vowel(350)).astype(np.float32), 14)
    f0 = estimate_f0(wav, RATE, F0Config(method="praat"))
    whole = second_voice(wav, RATE, f0, HOP)
    assert np.count_nonzero(f0) / 3 > 1000
    assert whole == pytest.approx(suspicion(vowel(260) + vowel(350)), abs=0.02)


@pytest.mark.parametrize("voice", VOICES, ids=lambda voice: voice.name)
def test_a_strong_formant_is_no_second_voice(voice: FormantVoice) -> None:
    """The first voice's pitch was taken for a multiple of it, and the rest for another."""
    wav = sing(voice, 12.0, RATE, seed=3).wav[6 * RATE :]
    assert suspicion(wav) < 0.5


def test_datasets_keep_the_values_of_their_version() -> None:
    wav = sing(VOICES[0], 12.0, RATE, seed=3).wav[6 * RATE :]
    f0 = estimate_f0(wav, RATE, F0Config(method="praat"))
    before, now = (measure_pitch(wav, RATE, f0, HOP, version) for version in (3, None))
    assert before.pop("second_voice") == second_voice(wav, RATE, f0, HOP, EARLIER_RULES) > 0.5
    assert now.pop("second_voice") == second_voice(wav, RATE, f0, HOP) < 0.5
    assert before == now


def test_the_frames_of_parts_add_up() -> None:
    wav = (vowel(260) + vowel(350)).astype(np.float32)
    f0 = estimate_f0(wav, RATE, F0Config(method="praat"))
    one = suspects(wav, RATE, f0, HOP)
    assert 0 < one.suspect <= one.examined
    assert (one + one).examined == 2 * one.examined
    assert (one + one).suspicion() == pytest.approx(one.suspicion())


@pytest.mark.parametrize("name", SOLO)
def test_solo_recordings(name: str, real_audio: Path) -> None:
    """Alone, in noise, and in a room that rings for half a second at a quarter of the energy."""
    wav, rate = soundfile.read(real_audio / name, frames=5 * RATE)
    rng = np.random.default_rng(0)
    assert suspicion(wav, rate) < 0.4
    assert suspicion(wav + rng.normal(size=len(wav)) * wav.std() / 10, rate) < 0.4
    time = np.arange(int(0.6 * rate)) / rate
    tail = rng.normal(size=len(time)) * 10 ** (-3 * time / 0.5)
    room = 0.5 * tail / np.linalg.norm(tail)
    room[0] = 1
    assert suspicion(fftconvolve(wav, room)[: len(wav)], rate) < 0.5


def test_accompanied_recordings(real_audio: Path) -> None:
    ensemble, rate = soundfile.read(real_audio / "carnatic.flac")
    assert suspicion(ensemble, rate) > 0.6
    song, rate = soundfile.read(real_audio / "karissa_hobbs.ogg")
    assert suspicion(song.mean(axis=1), rate) > 0.6


@pytest.mark.parametrize("db, least", [(0, 0.6), (-6, 0.5)])
def test_two_singers(db: float, least: float, real_audio: Path) -> None:
    first, _ = soundfile.read(real_audio / "vocadito_1.flac", frames=5 * RATE, start=5 * RATE)
    second, _ = soundfile.read(real_audio / "singing-female.flac", frames=5 * RATE)
    duet = first / first.std() + second / second.std() * 10 ** (db / 20)
    assert suspicion(0.1 * duet) > least
