"""Quantisation to a PCM subtype and back."""

from __future__ import annotations

import numpy as np
import pytest

from stages.pcm import Subtype, dequantise, quantise


def test_every_16_bit_value_survives_the_round_trip() -> None:
    samples = np.arange(-(1 << 15), 1 << 15, dtype=np.int16)
    wav = dequantise(samples, "PCM_16")
    assert wav.dtype == np.float32
    assert (wav.min(), wav.max()) == (-1.0, 1.0 - 2.0**-15)
    again = quantise(wav, "PCM_16")
    assert again.dtype == np.int16
    np.testing.assert_array_equal(again, samples)


def test_every_24_bit_value_survives_the_round_trip() -> None:
    samples = np.arange(-(1 << 23), 1 << 23, dtype=np.int32)
    wav = dequantise(samples, "PCM_24")
    assert wav.dtype == np.float32
    again = quantise(wav, "PCM_24")
    assert again.dtype == np.int32
    np.testing.assert_array_equal(again, samples)


@pytest.mark.parametrize(("subtype", "scale"), [("PCM_16", 1 << 15), ("PCM_24", 1 << 23)])
def test_halves_go_to_even_and_overshoot_is_clipped(subtype: Subtype, scale: int) -> None:
    steps = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.49, scale, -scale, -2 * scale, np.inf])
    wav = (steps / scale).astype(np.float32)
    expected = [0, 2, 2, 0, -2, 0, scale - 1, -scale, -scale, scale - 1]
    assert quantise(wav, subtype).tolist() == expected


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_nan_is_a_bug_and_not_a_sample(subtype: Subtype) -> None:
    with pytest.raises(FloatingPointError):
        quantise(np.array([0.0, np.nan], np.float32), subtype)
