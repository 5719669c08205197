"""Post-processing steps, each on contours with a known result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stages.f0 import F0Config, estimate_f0
from stages.f0.pitch import clean_pitch, f0_to_pitch, resize2d_f0
from stages.f0.post import (
    PostConfig,
    a_weighting,
    drop_short_runs,
    interpolate_gaps,
    levels_db,
    median_of_runs,
    refine,
    repair_octaves,
    voiced_runs,
    weigh_a,
)
from stages.frames import resize_contour
from stages.types import Array

RATE = 44100
HOP = 512
FRAME_S = 0.01
NO_WAV = np.zeros(0, dtype=np.float32)


def contour(*values: float) -> Array:
    return np.array(values, dtype=np.float32)


def sine(hz: float, seconds: float, level: float = 1.0) -> Array:
    return (level * np.sin(2 * np.pi * hz / RATE * np.arange(int(seconds * RATE)))).astype(
        np.float32
    )


# All steps


def test_without_steps_it_is_the_same_array() -> None:
    f0 = contour(0, 100, 400, 100, 0)
    assert refine(f0, NO_WAV, RATE, HOP, PostConfig()) is f0


@settings(max_examples=60, deadline=None)
@given(
    f0=st.lists(st.one_of(st.just(0.0), st.floats(50, 1100, width=32)), max_size=60),
    gate=st.sampled_from(["none", "rms", "a-weighted"]),
    repair=st.booleans(),
    median_ms=st.sampled_from([None, 1.0, 40.0, 1000.0]),
    min_voiced_ms=st.sampled_from([None, 1.0, 40.0, 1000.0]),
    interpolate=st.booleans(),
    num_samples=st.sampled_from([1, 600, 20000]),
)
def test_any_steps_on_any_contour(
    f0: list[float],
    gate: str,
    repair: bool,
    median_ms: float | None,
    min_voiced_ms: float | None,
    interpolate: bool,
    num_samples: int,
) -> None:
    """Shape and type stay, the input is left alone, every value lies in what was voiced."""
    given_f0 = contour(*f0)
    before = given_f0.copy()
    cfg = PostConfig(
        gate=gate,  # type: ignore[arg-type]
        gate_db=-40,
        repair_octaves=repair,
        median_ms=median_ms,
        min_voiced_ms=min_voiced_ms,
        interpolate=interpolate,
    )
    wav = np.random.default_rng(0).normal(size=num_samples).astype(np.float32)
    out = refine(given_f0, wav, RATE, HOP, cfg)
    np.testing.assert_array_equal(given_f0, before)
    assert out.shape == before.shape and out.dtype == np.float32
    assert np.isfinite(out).all()
    if interpolate:
        assert (out > 0).all() or not out.any()
    else:
        assert not out[before == 0].any()
    if out.any():
        octaves = 4 if repair else 1
        voiced = out[out > 0]
        assert voiced.min() >= before[before > 0].min() / octaves * (1 - 1e-6)
        assert voiced.max() <= before.max() * octaves * (1 + 1e-6)


def test_the_order_of_the_steps() -> None:
    """The gate opens gaps, which are then filled from what is left."""
    wav = sine(200, 1.0)
    wav[RATE // 2 :] = 0
    f0 = np.full(RATE // HOP, 200, dtype=np.float32)
    f0[60:] = 350  # noise, says the gate
    f0[20] = 400  # an octave slip
    cfg = PostConfig(gate="rms", repair_octaves=True, interpolate=True)
    np.testing.assert_allclose(refine(f0, wav, RATE, HOP, cfg), 200, rtol=1e-6)


def test_estimation_takes_the_steps(real_audio: Path) -> None:
    wav, rate = soundfile.read(real_audio / "singing-female.flac", dtype="float32")
    plain = estimate_f0(wav, rate, F0Config())
    smooth = estimate_f0(wav, rate, F0Config(median_ms=60, interpolate=True))
    assert (plain == 0).any() and (smooth > 0).all()
    expected = refine(plain, wav, rate, HOP, PostConfig(median_ms=60, interpolate=True))
    np.testing.assert_array_equal(smooth, expected)


# The gate


def test_the_level_of_a_sine() -> None:
    """RMS 0.707 is -3.01 dBFS; beyond the clip there is nothing, at its ends what there is."""
    level = levels_db(sine(200, 1.0), RATE, HOP, 100)
    inside = RATE // HOP + 1
    np.testing.assert_allclose(level[:inside], -3.01, atol=0.15)
    assert (level[inside + 3 :] == -np.inf).all()


def test_the_level_is_that_around_the_frames_sample() -> None:
    """A tone that begins at 0.5 s lifts the window of 50 ms half-way when its middle is there."""
    wav = sine(400, 1.0)
    wav[: RATE // 2] = 0
    level = levels_db(wav, RATE, 441, 100)
    assert (level[:48] == -np.inf).all()
    assert level[50] == pytest.approx(-3.01 - 3.01, abs=0.1)
    np.testing.assert_allclose(level[53:], -3.01, atol=0.1)


def test_a_quiet_frame_after_a_loud_minute_keeps_its_level() -> None:
    wav = np.ones(60 * RATE, dtype=np.float32)
    wav[-RATE:] = 1e-5
    assert levels_db(wav, RATE, HOP, 5150)[-5] == pytest.approx(-100, abs=0.01)


@pytest.mark.parametrize(
    "hz, expected",
    [(31.62, -39.4), (100, -19.1), (501.2, -3.2), (1000, 0.0), (2512, 1.3), (10000, -2.5)],
)
def test_a_weighting_against_the_standards_table(hz: float, expected: float) -> None:
    """IEC 61672-1, table 3, which rounds to 0.1 dB; its frequencies are 10^(n/10)."""
    gain_db = 20 * np.log10(a_weighting(np.array([hz])))
    assert gain_db[0] == pytest.approx(expected, abs=0.06)
    weighed = weigh_a(sine(hz, 1.0), RATE)[RATE // 4 : -RATE // 4]
    assert 10 * np.log10(2 * np.mean(weighed**2)) == pytest.approx(expected, abs=0.1)


def test_a_weighting_does_not_wrap_around() -> None:
    wav = sine(30, 1.0)
    wav[: RATE // 2] = 0
    assert np.abs(weigh_a(wav, RATE)[:4000]).max() < 1e-5


def test_the_gates_differ_by_the_ear() -> None:
    """A hum of 50 Hz at -15 dBFS passes by its level; by ear it is 30 dB softer."""
    wav = sine(50, 1.0, 0.25)
    f0 = np.full(RATE // HOP, 50, dtype=np.float32)
    assert (refine(f0, wav, RATE, HOP, PostConfig(gate="rms", gate_db=-30)) == 50).all()
    gated = refine(f0, wav, RATE, HOP, PostConfig(gate="a-weighted", gate_db=-30))
    assert not gated.any()
    louder = refine(f0, wav, RATE, HOP, PostConfig(gate="a-weighted", gate_db=-48))
    assert (louder == 50).all()


# Octaves


@pytest.mark.parametrize("octaves", [-2, -1, 1, 2])
@pytest.mark.parametrize("frames", [1, 4, 10])
def test_a_slip_moves_back(octaves: int, frames: int) -> None:
    glide = (200 * 2 ** (np.arange(40) / 120)).astype(np.float32)
    slipped = glide.copy()
    slipped[15 : 15 + frames] *= 2.0**octaves
    np.testing.assert_allclose(repair_octaves(slipped, FRAME_S), glide, rtol=1e-6)


def test_a_slip_between_short_gaps_moves_back() -> None:
    f0 = contour(200, 200, 0, 0, 400, 404, 0, 0, 202, 202)
    repaired = repair_octaves(f0, FRAME_S)
    np.testing.assert_array_equal(repaired, contour(200, 200, 0, 0, 200, 202, 0, 0, 202, 202))


def test_several_slips_in_a_row_move_back_to_the_same_octave() -> None:
    f0 = np.full(40, 200, dtype=np.float32)
    f0[10:13] = f0[16:18] = 400
    np.testing.assert_array_equal(repair_octaves(f0, FRAME_S), np.full(40, 200))


@pytest.mark.parametrize(
    "f0",
    [
        contour(*[200] * 20, *[400] * 20),  # a leap that stays
        contour(*[200] * 20, *[400] * 11, *[200] * 20),  # a note of 0.11 s
        contour(*[200] * 5, *[400] * 5),  # one neighbour only
        contour(*[400] * 3, *[200] * 9),
        contour(*[200] * 9, *[300] * 3, *[200] * 9),  # a fifth
        contour(*[200] * 9, *[600] * 3, *[200] * 9),  # a twelfth
        contour(*[100] * 9, *[800] * 3, *[100] * 9),  # three octaves
        contour(*[100] * 9, *[200] * 3, *[400] * 9),  # an arpeggio
        contour(*[200] * 9, *[0] * 6, *[400] * 3, *[0] * 6, *[200] * 9),  # far from either
        contour(),
        contour(0, 0),
        contour(200),
    ],
)
def test_what_is_no_slip_is_left_alone(f0: Array) -> None:
    np.testing.assert_array_equal(repair_octaves(f0, FRAME_S), f0)


def test_slips_on_real_singing(real_audio: Path) -> None:
    """Hand annotation with 30 slips put in: all move back, and nothing else moves."""
    truth = np.loadtxt(real_audio / "vocadito_1_f0.csv", delimiter=",")[:, 1].astype(np.float32)
    frame_s = 256 / RATE
    np.testing.assert_array_equal(repair_octaves(truth, frame_s), truth)
    long_runs = [run for run in voiced_runs(truth) if run[1] - run[0] > 40][:30]
    assert len(long_runs) == 30
    slipped = truth.copy()
    for i, (start, stop) in enumerate(long_runs):
        at = (start + stop) // 2
        slipped[at : at + 1 + i % 15] *= (0.25, 0.5, 2, 4)[i % 4]
    np.testing.assert_array_equal(repair_octaves(slipped, frame_s), truth)


def test_slips_that_were_resized_move_back() -> None:
    """A network's clock of 10 ms put on frames of 11.6 ms."""
    slipped = np.full(300, 200.0)
    for i, at in enumerate(range(20, 290, 20)):
        slipped[at : at + 2 + i % 6] *= (0.5, 2)[i % 2]
    f0 = resize_contour(slipped, np.arange(300) * 441.0, 258, HOP)
    assert np.count_nonzero(f0 != 200) > 30
    np.testing.assert_array_equal(repair_octaves(f0, HOP / RATE), np.full(258, 200))


# Median, short runs, interpolation


def test_the_median_drops_outliers_and_stays_within_runs() -> None:
    f0 = contour(0, 100, 101, 300, 102, 103, 0, 500, 501, 0, 900, 0)
    smooth = median_of_runs(f0, 3)
    np.testing.assert_array_equal(
        smooth, contour(0, 101, 101, 102, 103, 102, 0, 501, 500, 0, 900, 0)
    )


@pytest.mark.parametrize("window", [1, 3, 9, 101])
def test_a_median_of_any_length_gives_values_of_the_same_run(window: int) -> None:
    rng = np.random.default_rng(0)
    f0 = rng.uniform(100, 500, 300).astype(np.float32)
    f0[rng.uniform(size=300) < 0.1] = 0
    smooth = median_of_runs(f0, window)
    if window == 1:
        np.testing.assert_array_equal(smooth, f0)
    for start, stop in voiced_runs(f0):
        assert np.isin(smooth[start:stop], f0[start:stop]).all()
    np.testing.assert_array_equal(smooth == 0, f0 == 0)


@pytest.mark.parametrize("median_ms, frames", [(1, 1), (29, 3), (40, 3), (60, 5)])
def test_the_medians_length_in_frames(median_ms: float, frames: int) -> None:
    f0 = np.random.default_rng(0).uniform(100, 500, 50).astype(np.float32)
    out = refine(f0, NO_WAV, RATE, HOP, PostConfig(median_ms=median_ms))
    np.testing.assert_array_equal(out, median_of_runs(f0, frames))


def test_short_runs_become_unvoiced() -> None:
    f0 = contour(100, 0, 100, 101, 0, 100, 101, 102, 0, 100, 101)
    expected = contour(0, 0, 0, 0, 0, 100, 101, 102, 0, 0, 0)
    np.testing.assert_array_equal(drop_short_runs(f0, 3), expected)
    cfg = PostConfig(min_voiced_ms=2.5 * 1000 * HOP / RATE)
    np.testing.assert_array_equal(refine(f0, NO_WAV, RATE, HOP, cfg), expected)


def test_gaps_are_filled_in_log_f0() -> None:
    f0 = contour(0, 0, 100, 0, 400, 300, 0)
    filled = interpolate_gaps(f0)
    np.testing.assert_allclose(filled, contour(100, 100, 100, 200, 400, 300, 300), rtol=1e-6)
    np.testing.assert_array_equal(filled[f0 > 0], f0[f0 > 0])


@pytest.mark.parametrize("f0", [contour(), contour(0), contour(0, 0, 0)])
def test_without_a_voiced_frame_nothing_is_filled(f0: Array) -> None:
    np.testing.assert_array_equal(interpolate_gaps(f0), f0)


def test_voiced_runs() -> None:
    assert voiced_runs(contour(1, 1, 0, 1, 0, 0, 1)) == [(0, 2), (3, 4), (6, 7)]
    assert voiced_runs(contour(0, 1, 0)) == [(1, 2)]
    assert voiced_runs(contour(0)) == voiced_runs(contour()) == []


# Settings


@pytest.mark.parametrize(
    "name, value",
    [
        ("gate_db", 3.0),
        ("gate_db", -121.0),
        ("gate_db", float("nan")),
        ("median_ms", 0.0),
        ("median_ms", 1001.0),
        ("min_voiced_ms", -5.0),
        ("min_voiced_ms", float("nan")),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"f0\.{name} must be"):
        F0Config(**{name: value})  # type: ignore[arg-type]


# The article's functions; its resizing is compared with the article's own numbers in test_f0


@pytest.mark.parametrize("unvoiced", [0, 1])
def test_a_track_mostly_unvoiced_becomes_unvoiced(unvoiced: int) -> None:
    track: NDArray[np.int64] = np.full(20, unvoiced)
    track[3:5] = 200  # 90 %: just kept
    np.testing.assert_array_equal(clean_pitch(track, unvoiced), track)
    track[4] = unvoiced
    np.testing.assert_array_equal(clean_pitch(track, unvoiced), np.full(20, unvoiced))
    assert track[3] == 200  # the caller's own is left as it was


def test_tracks_of_no_frames_and_of_voice_stay() -> None:
    assert len(clean_pitch(contour())) == 0
    np.testing.assert_array_equal(clean_pitch(contour(1, 1, 1)), contour(1, 1, 1))


def test_midi_numbers() -> None:
    pitch = f0_to_pitch(contour(440, 220, 261.6256, 0))
    np.testing.assert_allclose(pitch, [69, 57, 60, np.nan], atol=1e-5)


def test_resizing_no_frames() -> None:
    assert len(resize2d_f0(contour(100, 200), 0)) == 0
