"""The vote of several contours."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stages.f0.ensemble import combine


def vote(*contours: list[float]) -> NDArray[np.float32]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return combine(np.array(contours, dtype=np.float32))


def test_an_octave_error_is_outvoted() -> None:
    np.testing.assert_allclose(vote([200, 200], [402, 100], [202, 202]), [200.998, 200.998], 1e-5)
    # Two octave errors that do not agree with each other are two errors.
    np.testing.assert_allclose(vote([100], [200], [201], [400]), [200.499], rtol=1e-5)


@pytest.mark.parametrize("wrong", [2.0, 0.5, 3.0, 1 / 3])
def test_a_vote_of_three_finds_the_truth_in_spite_of_one(wrong: float) -> None:
    truth = np.linspace(100, 400, 300, dtype=np.float32)
    contours = np.stack([truth * np.float32(1 + e) for e in (-1e-3, 0, 1e-3)])
    rng = np.random.default_rng(0)
    contours[rng.integers(0, 3, 300), np.arange(300)] *= np.float32(wrong)
    assert np.abs(1200 * np.log2(combine(contours) / truth)).max() < 2


def test_the_median_of_an_even_number_lies_between_in_log_f0() -> None:
    np.testing.assert_allclose(vote([200], [250]), [np.sqrt(200 * 250)], rtol=1e-6)
    np.testing.assert_allclose(vote([200], [210], [231], [240]), [np.sqrt(210 * 231)], rtol=1e-6)


def test_half_of_the_methods_make_a_frame_voiced() -> None:
    np.testing.assert_array_equal(vote([200, 0, 0], [0, 0, 200]), [200, 0, 200])
    np.testing.assert_array_equal(vote([200, 0, 200], [0, 0, 200], [0, 0, 0]), [0, 0, 200])
    np.testing.assert_array_equal(vote([200, 200], [0, 200], [0, 0], [0, 200]), [0, 200])


def test_an_unvoiced_method_has_no_vote_on_the_octave() -> None:
    """Log f0 of 0 Hz is no number; it must not pull the others down."""
    np.testing.assert_array_equal(vote([1.5, 200, 200], [0, 0, 0]), [1.5, 200, 200])


def test_a_tie_goes_to_the_neighbours_pitch() -> None:
    np.testing.assert_array_equal(
        vote([200, 400, 400, 200, 200], [200, 200, 200, 200, 200]), [200, 200, 200, 200, 200]
    )
    np.testing.assert_array_equal(
        vote([400, 400, 400, 0, 0], [400, 200, 400, 200, 400]), [400, 400, 400, 200, 400]
    )
    # Two against two: the neighbours of both sides are in between, the nearer octave counts.
    np.testing.assert_array_equal(
        vote([210, 220, 240], [210, 220, 240], [210, 440, 240], [210, 440, 240]), [210, 220, 240]
    )


def test_a_frame_that_too_few_call_voiced_is_no_neighbour() -> None:
    voiced_by_one = vote([400, 200, 210], [0, 400, 210], [0, 0, 0])
    np.testing.assert_array_equal(voiced_by_one, [0, 200, 210])


def test_where_every_frame_is_a_tie_the_first_method_wins() -> None:
    np.testing.assert_array_equal(vote([200, 210], [400, 420]), [200, 210])
    np.testing.assert_array_equal(vote([400, 420], [200, 210]), [400, 420])


def test_no_frames_and_no_voice() -> None:
    assert combine(np.zeros((3, 0), dtype=np.float32)).shape == (0,)
    silent = vote([0, 0], [0, 0])
    assert silent.dtype == np.float32
    np.testing.assert_array_equal(silent, [0, 0])


pitches = st.one_of(st.just(0.0), st.floats(50, 1100, width=32))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(2, 5).flatmap(
        lambda m: st.lists(st.lists(pitches, min_size=m, max_size=m), min_size=1, max_size=8)
    )
)
def test_what_is_said_lies_among_what_was_heard(frames: list[list[float]]) -> None:
    contours = np.array(frames, dtype=np.float32).T
    f0 = combine(contours)
    voiced = contours > 0
    np.testing.assert_array_equal(f0 > 0, 2 * voiced.sum(axis=0) >= len(contours))
    for heard, said in zip(contours.T, f0, strict=True):
        if said > 0:
            positive = heard[heard > 0]
            assert positive.min() * 0.999999 <= said <= positive.max() * 1.000001
    # Methods that agree: nothing to decide.
    same = np.stack([contours[0]] * len(contours))
    np.testing.assert_allclose(combine(same), contours[0], rtol=1e-6)
