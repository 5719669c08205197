"""Units of clips, per song, and their bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from models.encoders import load_encoder
from stages.resample import ResampleConfig, resample
from stages.types import Array
from stages.units import EncoderConfig, encode_units, pack_units, unpack_units

RATE = 44100
WEIGHTLESS = ["log-mel", "mfcc"]


def noise(num_samples: int, seed: int, level: float = 0.1) -> Array:
    return (np.random.default_rng(seed).normal(size=num_samples) * level).astype(np.float32)


def encode(
    clips: list[Array], song_of: list[str], name: str = "mfcc", **settings: str
) -> list[Array]:
    cfg = EncoderConfig(name=name, **settings)  # type: ignore[arg-type]
    return encode_units(clips, song_of, RATE, load_encoder(name), cfg, ResampleConfig())


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_units_are_those_of_the_resampled_clip(name: str) -> None:
    encoder = load_encoder(name)
    clips = [noise(RATE, 1), noise(2 * RATE + 77, 2)]
    units = encode(clips, ["a", "b"], name)
    for clip, frames in zip(clips, units, strict=True):
        wav = resample(clip, RATE, encoder.sample_rate, ResampleConfig())
        expected = encoder.encode([torch.from_numpy(wav)])[0].numpy()
        assert frames.dtype == np.float32
        np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_a_tone_at_20_khz_is_as_good_as_silence(name: str) -> None:
    tone = (0.5 * np.sin(2 * np.pi * 20000 / RATE * np.arange(RATE))).astype(np.float32)
    heard, silence = encode([tone, np.zeros(RATE, np.float32)], ["a", "b"], name)
    np.testing.assert_allclose(heard[8:-8], silence[8:-8], atol=1e-2)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 500, 2205])
def test_a_short_clip_has_a_frame(num_samples: int) -> None:
    (units,) = encode([noise(num_samples, 0)], ["a"], normalize="song")
    assert len(units) >= 1
    assert np.isfinite(units).all()


def test_no_clips() -> None:
    assert encode([], []) == []


def test_clips_without_a_song_are_refused() -> None:
    with pytest.raises(ValueError, match="2 clips, but 1 song ids"):
        encode([noise(RATE, 0), noise(RATE, 1)], ["a"])


def test_samples_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode([np.full(RATE, np.nan, np.float32)], ["a"])


def test_normalised_per_song() -> None:
    """Mean 0 and variance 1 over the clips of a song, wherever in the call they stand."""
    clips = [noise(RATE, 1), noise(RATE // 2, 2, 0.5), noise(2 * RATE, 3, 0.01)]
    units = encode(clips, ["a", "b", "a"], normalize="song")
    for song in (np.concatenate([units[0], units[2]]), units[1]):
        np.testing.assert_allclose(song.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(song.std(axis=0), 1, atol=1e-5)
    assert np.abs(units[0][:, 0].mean()) > 0.5  # the song as a whole, not each clip
    alone = encode([clips[0], clips[2]], ["a", "a"], normalize="song")
    np.testing.assert_array_equal(units[0], alone[0])
    np.testing.assert_array_equal(units[2], alone[1])


class Steady:
    """An encoder of three dimensions: one moves by a rounding, one with the clip, one never."""

    name = "steady"
    sample_rate = RATE
    hop_length = RATE // 50
    dim = 3

    def encode(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        frames = [wav[:: self.hop_length] for wav in wavs]
        return [torch.stack([0.1 + 1e-8 * (f > 0), f, torch.zeros_like(f)], 1) for f in frames]


def test_what_never_changes_becomes_zero() -> None:
    cfg = EncoderConfig(normalize="song")
    clips = [noise(7 * RATE, 0), noise(3 * RATE, 1)]
    units = encode_units(clips, ["a", "a"], RATE, Steady(), cfg, ResampleConfig())
    song = np.concatenate(units)
    np.testing.assert_array_equal(song[:, [0, 2]], np.zeros((500, 2)))
    assert song[:, 1].std() == pytest.approx(1)


# Bytes


def test_packed_as_little_endian_rows() -> None:
    units = np.array([[1.0, -2.0, 0.5], [0.0, 65504.0, 6e-8]], dtype=np.float32)
    data = pack_units(units)
    assert data == b"\x00\x3c\x00\xc0\x00\x38" + b"\x00\x00\xff\x7b\x01\x00"


@given(
    hnp.arrays(
        np.float16,
        st.tuples(st.integers(0, 20), st.integers(1, 8)),
        elements=st.floats(-65504, 65504, width=16),
    )
)
def test_packing_loses_nothing_that_float16_holds(half: np.ndarray) -> None:
    units = half.astype(np.float32)
    back = unpack_units(pack_units(units), units.shape[1])
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, units)


@pytest.mark.parametrize("value", [65520.0, -1e6, np.inf, np.nan])
def test_what_float16_cannot_hold_is_named(value: float) -> None:
    units = np.zeros((5, 4), dtype=np.float32)
    units[3, 2] = value
    with pytest.raises(OverflowError, match=re.escape(f"have {value:g} in dimension 2 of frame 3")):
        pack_units(units)


@pytest.mark.parametrize("data, dim", [(b"\x00" * 10, 4), (b"\x00" * 3, 1), (b"", 0)])
def test_bytes_that_are_no_frames_are_refused(data: bytes, dim: int) -> None:
    with pytest.raises(ValueError, match=f"not float16 frames of width {dim}"):
        unpack_units(data, dim)
