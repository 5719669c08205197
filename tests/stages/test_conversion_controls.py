"""Transposition, protection of consonants, and the loudness envelope."""

from __future__ import annotations

import numpy as np
import pytest

from stages.conversion_controls import EnvelopeMix, protect, semitones_between, transpose
from stages.types import Array

RATE = 8000


def whole(ratio: float, wav: Array, song: Array) -> Array:
    mix = EnvelopeMix(ratio, RATE)
    return np.concatenate([mix.push(wav, song), mix.finish()])


def sung(seconds: float, level: float = 0.1, seed: int = 0) -> Array:
    """Noise whose loudness swells twice a second."""
    t = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).standard_normal(len(t))
    return (level * (2 + np.sin(4 * np.pi * t + seed)) * noise).astype("f4")


def rms_db(wav: Array) -> Array:
    """Measure the RMS in dB of each tenth of a second."""
    tenths = wav[: len(wav) // 800 * 800].reshape(-1, 800).astype("f8")
    return 10 * np.log10(np.square(tenths).mean(axis=1))


def test_an_octave_is_twelve_semitones() -> None:
    f0 = np.array([0, 100, 220.5], "f4")
    assert np.array_equal(transpose(f0, 12), np.array([0, 200, 441], "f4"))
    assert np.allclose(transpose(transpose(f0, 3.5), -3.5), f0, rtol=1e-6)
    assert transpose(f0, 5).dtype == np.float32


@pytest.mark.parametrize(("target", "expected"), [(220, 0), (440, 12), (110, -12), (233, 1)])
def test_the_median_of_what_is_voiced_goes_to_the_target(target: float, expected: int) -> None:
    f0 = np.array([0, 0, 0, 0, 100, 220, 900], "f4")
    assert semitones_between(f0, target) == expected


@pytest.mark.parametrize(
    ("target", "expected"), [(220, 0), (310, 0), (312, 12), (100, -12), (50, -24), (156, 0)]
)
def test_octaves_keep_the_key(target: float, expected: int) -> None:
    assert semitones_between(np.array([0, 220, 220], "f4"), target, 12) == expected


def test_no_pitch_to_transpose_from_or_to() -> None:
    with pytest.raises(ValueError, match="no frame is voiced"):
        semitones_between(np.zeros(5, "f4"), 200)
    for target in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be finite and above 0"):
            semitones_between(np.full(5, 100, "f4"), target)


def test_unvoiced_frames_keep_their_plain_units_and_the_border_is_soft() -> None:
    rng = np.random.default_rng(0)
    blended, plain = rng.standard_normal((2, 7, 3)).astype("f4")
    voiced = np.array([True, True, False, False, True, True, True])
    full = protect(blended, plain, voiced, 1.0)
    assert np.array_equal(full[2:4], plain[2:4])
    assert np.allclose(full[[1, 4]], (blended + plain)[[1, 4]] / 2)
    assert np.array_equal(full[[0, 5, 6]], blended[[0, 5, 6]])
    assert np.array_equal(protect(blended, plain, voiced, 0.0), blended)
    part = protect(blended, plain, voiced, 0.25)
    assert np.allclose(part[2], 0.75 * blended[2] + 0.25 * plain[2])
    assert part.dtype == np.float32


def test_units_that_do_not_fit_are_refused() -> None:
    units, voiced = np.zeros((4, 2), "f4"), np.ones(4, bool)
    for wrong in ((units[:3], units, voiced), (units, units[:, :1], voiced), (units, units, [1])):
        with pytest.raises(ValueError, match="shapes differ"):
            protect(wrong[0], wrong[1], np.array(wrong[2], bool), 1.0)


def test_a_ratio_of_0_keeps_every_sample() -> None:
    wav = sung(1.3)
    assert np.array_equal(whole(0, wav, sung(1.3, seed=1)), wav)


def test_a_ratio_of_1_gives_the_loudness_of_the_song() -> None:
    wav, song = sung(4, 0.02), sung(4, seed=1)
    before = np.abs(rms_db(wav) - rms_db(song))
    after = np.abs(rms_db(whole(1, wav, song)) - rms_db(song))
    assert before.max() > 15 and after.max() < 1


def test_half_the_ratio_goes_half_the_way_in_decibels() -> None:
    wav = sung(2)
    assert np.allclose(rms_db(whole(0.5, wav, wav / 4)), rms_db(wav / 2), atol=0.05)


def test_pieces_give_the_samples_of_the_whole() -> None:
    wav, song = sung(5.013), sung(5.013, seed=1)
    expected = whole(0.7, wav, song)
    assert len(expected) == len(wav)
    for cuts in ([*range(1200)], [0, 1, 399, 400, 401, 1200, 1200, 30000], [0, 20000]):
        mix = EnvelopeMix(0.7, RATE)
        ends = [*cuts[1:], len(wav)]
        pieces = []
        for start, end in zip(cuts, ends, strict=True):
            pieces.append(mix.push(wav[start:end], song[start:end]))
            assert end - sum(map(len, pieces)) < 2 * mix.hop
        assert np.array_equal(np.concatenate([*pieces, mix.finish()]), expected)


@pytest.mark.parametrize("length", [0, 1, 399, 400, 401, 800])
def test_short_songs_come_back_whole(length: int) -> None:
    wav = sung(0.1)[:length]
    out = whole(1, wav, wav)
    assert out.dtype == np.float32 and np.allclose(out, wav, rtol=1e-6)


def test_what_is_nearly_silent_is_not_blown_up() -> None:
    song = sung(2, 0.5)
    hiss = sung(2, 1e-5, seed=1)
    assert np.abs(whole(1, hiss, song)).max() <= 10.0001 * np.abs(hiss).max()
    assert np.abs(whole(1, hiss, np.zeros_like(song))).max() <= np.abs(hiss).max()
    assert np.abs(whole(1, hiss, 3 * hiss)).max() < 1.01 * np.abs(hiss).max()


def test_silence_stays_silence() -> None:
    song = sung(2)
    assert not whole(1, np.zeros_like(song), song).any()
    assert rms_db(whole(1, song, np.zeros_like(song))).max() < -58


def test_songs_of_two_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths differ"):
        EnvelopeMix(1, RATE).push(np.zeros(3, "f4"), np.zeros(4, "f4"))
