"""The frame clock and the one function that moves contours onto it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.frames import num_frames, resize_contour

HOP = 512


@given(st.integers(0, 10**9), st.integers(1, 4096))
def test_frames_are_the_whole_hops(num_samples: int, hop_length: int) -> None:
    frames = num_frames(num_samples, hop_length)
    assert frames * hop_length <= num_samples < (frames + 1) * hop_length


def test_a_contour_on_the_clock_stays_as_it_is() -> None:
    f0 = np.array([0, 100, 110, 0, 0, 220, 0], dtype=np.float64)
    for mode in ("linear", "nearest"):
        out = resize_contour(f0, np.arange(7) * HOP, 7, HOP, mode)
        assert out.dtype == np.float32
        np.testing.assert_array_equal(out, f0)


def test_linear_blends_voiced_neighbours_only() -> None:
    f0 = np.array([100.0, 120.0, 0.0, 300.0])
    at = np.array([0.25, 1.25, 2.25, 3.25]) * HOP
    out = resize_contour(f0, at, 5, HOP)
    # frame 0: a quarter of a step before the first value; 1: three quarters of the way to 120;
    # 2: 120 is 0.75 steps away, the gap 0.25; 3: 300 is nearer; 4: 0.75 steps beyond the end.
    np.testing.assert_allclose(out, [100.0, 115.0, 0.0, 300.0, 0.0])


def test_linear_does_not_blend_octaves() -> None:
    f0 = np.array([200.0, 400.0, 200.0, 280.0])
    out = resize_contour(f0, (np.arange(4) + 0.25) * HOP, 4, HOP)
    np.testing.assert_allclose(out, [200.0, 400.0, 200.0, 260.0])


def test_nearest_never_makes_new_values() -> None:
    f0 = np.array([100.0, 200.0, 0.0, 300.0])
    at = np.array([0.25, 1.25, 2.25, 3.25]) * HOP
    np.testing.assert_array_equal(resize_contour(f0, at, 5, HOP, "nearest"), [100, 200, 0, 300, 0])


def test_beyond_both_ends_is_unvoiced() -> None:
    out = resize_contour(np.full(3, 150.0), np.array([4.0, 5.0, 6.0]) * HOP, 10, HOP)
    np.testing.assert_array_equal(np.flatnonzero(out), [4, 5, 6])
    near = resize_contour(np.full(3, 150.0), np.array([3.6, 4.6, 5.6]) * HOP, 10, HOP)
    np.testing.assert_array_equal(np.flatnonzero(near), [4, 5, 6])  # 3 is 0.6 steps before
    far = resize_contour(np.full(3, 150.0), np.array([3.4, 4.4, 5.4]) * HOP, 10, HOP)
    np.testing.assert_array_equal(np.flatnonzero(far), [3, 4, 5])  # 6 is 0.6 steps behind


def test_no_value_and_one_value() -> None:
    np.testing.assert_array_equal(resize_contour(np.zeros(0), np.zeros(0), 3, HOP), [0, 0, 0])
    out = resize_contour(np.array([150.0]), np.array([1.0 * HOP]), 3, HOP)
    np.testing.assert_array_equal(out, [0, 150, 0])


def test_values_without_a_position_are_refused() -> None:
    with pytest.raises(ValueError, match="must be equal and 1-D"):
        resize_contour(np.zeros(3), np.zeros(4), 3, HOP)


contours = st.lists(st.one_of(st.just(0.0), st.floats(50, 1100)), min_size=1, max_size=40)


@given(
    contours,
    st.floats(-600, 600),
    st.floats(50, 2000),
    st.integers(0, 60),
    st.sampled_from(["linear", "nearest"]),
)
def test_no_contour_invents_pitch(
    values: list[float], first: float, step: float, n_frames: int, mode: str
) -> None:
    """Each frame is unvoiced or between the two source values around it, both of them voiced."""
    f0 = np.array(values)
    at = first + step * np.arange(len(f0))
    out = resize_contour(f0, at, n_frames, HOP, mode)  # type: ignore[arg-type]
    assert out.shape == (n_frames,)
    for i in np.flatnonzero(out):
        distance = np.abs(at - i * HOP)
        around = f0[distance <= max(step, HOP / 2) * (1 + 1e-9)]
        around = around[around > 0]
        slack = 1e-6 * out[i]
        assert around.min() - slack <= out[i] <= around.max() + slack
