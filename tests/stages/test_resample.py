"""Resampling: parity with other programs, blocks against the whole, lengths, phase."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.torchaudio_compat import import_torchaudio
from stages.errors import BadInput, Reason
from stages.loudness import LoudnessConfig, apply_gain, measure_loudness
from stages.resample import BLOCK_SAMPLES, ResampleConfig, resample, stream_resampler
from stages.types import Array

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "preprocessing" / "resample.npz"
BACKENDS = [
    ResampleConfig(),
    ResampleConfig(quality="HQ"),
    ResampleConfig(backend="torchaudio"),
    ResampleConfig(backend="torchaudio", lowpass_filter_width=64),
]
PEER = ResampleConfig(quality="HQ")  # so-vits-svc
RATES = [(44100, 16000), (48000, 44100), (22050, 44100), (16000, 44100), (96000, 44100)]


def noise(num_samples: int, seed: int = 0) -> Array:
    wav = np.random.default_rng(seed).uniform(-0.9, 0.9, num_samples)
    return wav.astype(np.float32)


def in_blocks(wav: Array, lengths: list[int], rates: tuple[int, int], cfg: ResampleConfig) -> Array:
    """Resample `wav` in blocks of these lengths, then the rest of it."""
    stream = stream_resampler(*rates, cfg)
    parts, start = [], 0
    for length in lengths:
        parts.append(stream.push(wav[start : start + length], last=False))
        start += length
    return np.concatenate([*parts, stream.push(wav[start:], last=True)])


@pytest.mark.parametrize(
    ("name", "cfg", "tolerance"),
    [
        ("librosa_soxr_hq", ResampleConfig(quality="HQ"), 8e-7),
        (
            "torchaudio_Resample_lpw128",
            ResampleConfig(backend="torchaudio", lowpass_filter_width=128),
            8e-7,
        ),
        # torchaudio's function computes its filter in float32, its class, which we use, in float64.
        ("torchaudio_functional_default", ResampleConfig(backend="torchaudio"), 4e-6),
    ],
)
def test_44100_to_16000_is_the_references(name: str, cfg: ResampleConfig, tolerance: float) -> None:
    """tolerance: relative to the peak, which is 0.12 here."""
    with np.load(GOLDEN) as arrays:
        wav = arrays["to16k/in_i16"].astype(np.float32) / 32768
        expected = arrays[f"to16k/{name}"]
    resampled = resample(wav, 44100, 16000, cfg)
    assert resampled.dtype == np.float32
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(resampled, expected, rtol=0, atol=atol)


def as_so_vits_writes(case: str, source: str, mode: Literal["peak", "none"]) -> Array:
    """Reproduce so-vits-svc's resample.py with Cantor's functions, up to its int16.

    Its trimming of both ends is not ours (the slicer does that job): where it trims, its own two
    samples are taken.
    """
    with np.load(GOLDEN) as arrays:
        wav = arrays[f"resample/{source}/in"]
        if (trimmed := f"resample/{case}/trim_index") in arrays:
            wav = wav[slice(*arrays[trimmed])]
    if wav.dtype == np.int16:
        wav = wav.astype(np.float32) / 32768
    if wav.ndim == 2:
        wav = wav.mean(axis=1)
    wav = resample(wav, 48000 if case.startswith("48k") else 44100, 44100, PEER)
    return apply_gain(wav, measure_loudness(wav, 44100, LoudnessConfig(mode=mode)).gain_db)


@pytest.mark.parametrize(
    ("case", "source", "mode"),
    [
        ("44k_mono_5s", "44k_mono_5s", "peak"),
        ("44k_mono_5s_skiploud", "44k_mono_5s", "none"),
        ("44k_padded_trim_3.5s", "44k_padded_trim_3.5s", "peak"),
        ("44k_float_peak1.5_1s", "44k_float_peak1.5_1s", "peak"),
        ("44k_zeros_1s", "44k_zeros_1s", "peak"),
        ("48k_stereo_5s", "48k_stereo_5s", "peak"),
        ("48k_stereo_5s_skiploud", "48k_stereo_5s", "none"),
        ("48k_square_fullscale_1s_skiploud", "48k_square_fullscale_1s_skiploud", "none"),
    ],
)
def test_peak_mode_is_so_vits_resample(
    case: str, source: str, mode: Literal["peak", "none"]
) -> None:
    wav = as_so_vits_writes(case, source, mode)
    with np.load(GOLDEN) as arrays:
        expected = arrays[f"resample/{case}/out_i16"]
    # It truncates x * 32767, and what overshoots full scale wraps around.
    written = np.trunc(wav * np.float32(32767)).astype(np.int64).astype(np.int16)
    assert len(written) == len(expected)
    if case.startswith("44k"):
        np.testing.assert_array_equal(written, expected)
    else:
        # Another build of libsoxr may round its last bit differently: a step, and rarely.
        difference = (written - expected).astype(np.int16)  # modulo 2^16, like the wrapped ones
        assert np.abs(difference).max() <= 1
        assert np.count_nonzero(difference) <= len(expected) // 1000


@settings(deadline=None, max_examples=60)
@given(
    cfg=st.sampled_from(BACKENDS),
    rates=st.sampled_from([*RATES, (44100, 44100)]),
    num_samples=st.integers(0, 3 * BLOCK_SAMPLES),
    lengths=st.lists(st.integers(0, BLOCK_SAMPLES), max_size=6),
)
def test_blocks_give_the_same_bits_as_the_whole(
    cfg: ResampleConfig, rates: tuple[int, int], num_samples: int, lengths: list[int]
) -> None:
    wav = noise(num_samples)
    whole = resample(wav, *rates, cfg)
    assert len(whole) == -(-num_samples * rates[1] // rates[0])
    np.testing.assert_array_equal(in_blocks(wav, lengths, rates, cfg), whole)


@pytest.mark.parametrize("cfg", BACKENDS)
@pytest.mark.parametrize("num_samples", [0, 1, 2, 50])
def test_short_input(cfg: ResampleConfig, num_samples: int) -> None:
    for rates in RATES:
        wav = noise(num_samples)
        whole = resample(wav, *rates, cfg)
        assert len(whole) == -(-num_samples * rates[1] // rates[0])
        assert np.isfinite(whole).all()
        np.testing.assert_array_equal(in_blocks(wav, [1] * num_samples, rates, cfg), whole)


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("width", [6, 64])
@pytest.mark.parametrize("num_samples", [1000, 60041, BLOCK_SAMPLES, 3 * BLOCK_SAMPLES + 77])
def test_blocks_are_exact_against_one_call_of_torchaudio(
    rates: tuple[int, int], width: int, num_samples: int
) -> None:
    wav = noise(num_samples)
    transform = import_torchaudio().transforms.Resample(*rates, lowpass_filter_width=width)
    # It rounds lengths in float32 (one sample too few here at times); whole seconds come out exact.
    seconds = np.pad(wav, (0, -num_samples % rates[0]))
    length = -(-num_samples * rates[1] // rates[0])
    expected = transform(torch.from_numpy(seconds)).numpy()[:length]
    cfg = ResampleConfig(backend="torchaudio", lowpass_filter_width=width)
    # Convolutions of other lengths may add in another order: float32 rounding, nothing else.
    np.testing.assert_allclose(resample(wav, *rates, cfg), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rates", RATES)
def test_soxr_is_librosas_but_for_the_last_sample(rates: tuple[int, int]) -> None:
    """librosa has the same length, and a zero where libsoxr rounds the last sample away."""
    wav = noise(100003)
    expected = librosa.resample(wav, orig_sr=rates[0], target_sr=rates[1], res_type="soxr_vhq")
    resampled = resample(wav, *rates, ResampleConfig())
    assert len(resampled) == len(expected)
    np.testing.assert_allclose(resampled[:-1], expected[:-1], rtol=0, atol=1e-6)
    assert resampled[-1] != 0.0


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize(
    ("cfg", "atol"),
    [
        (ResampleConfig(), 1e-6),
        (ResampleConfig(quality="HQ"), 1e-4),
        (ResampleConfig(backend="torchaudio"), 2e-2),
        (ResampleConfig(backend="torchaudio", lowpass_filter_width=128), 1e-3),
    ],
)
def test_output_k_lies_at_its_time(
    rates: tuple[int, int], cfg: ResampleConfig, atol: float
) -> None:
    """A sine comes out as the same sine sampled at the new rate: no delay, no gain."""
    orig, target = (np.sin(2 * np.pi * 1234.5 * np.arange(rate) / rate) for rate in rates)
    resampled = resample(orig.astype(np.float32), *rates, cfg)
    edge = rates[1] // 20
    np.testing.assert_allclose(resampled[edge:-edge], target[edge:-edge], rtol=0, atol=atol)


@pytest.mark.parametrize("cfg", BACKENDS)
def test_a_stream_holds_back_less_than_its_block(cfg: ResampleConfig) -> None:
    """Memory is bounded: output follows input at any position."""
    stream = stream_resampler(48000, 44100, cfg)
    written = 0
    for k in range(1, 31):
        written += len(stream.push(noise(48000, seed=k), last=False))
        assert k * 44100 - written <= 1.1 * BLOCK_SAMPLES


def test_equal_rates_return_the_input() -> None:
    wav = noise(100)
    for cfg in BACKENDS:
        assert resample(wav, 16000, 16000, cfg) is wav


def test_strided_input_is_taken() -> None:
    """A channel of an interleaved block."""
    stereo = noise(2000).reshape(-1, 2)
    for cfg in BACKENDS:
        expected = resample(stereo[:, 0].copy(), 48000, 44100, cfg)
        np.testing.assert_array_equal(resample(stereo[:, 0], 48000, 44100, cfg), expected)


def test_torchaudio_refuses_ratios_that_need_gigabytes_of_filters() -> None:
    with pytest.raises(BadInput, match="44101 Hz to 44100 Hz") as caught:
        resample(noise(10), 44101, 44100, ResampleConfig(backend="torchaudio"))
    assert caught.value.reason is Reason.UNSUPPORTED
    assert len(resample(noise(44101), 44101, 44100, ResampleConfig())) == 44100


@pytest.mark.parametrize("rates", [(0, 44100), (44100, 0), (-1, 44100)])
def test_rates_must_be_positive(rates: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="sample rates must be positive"):
        resample(noise(10), *rates, ResampleConfig())


@pytest.mark.parametrize("width", [0, 1025])
def test_width_out_of_range_is_named(width: int) -> None:
    with pytest.raises(ValueError, match="lowpass_filter_width is"):
        ResampleConfig(lowpass_filter_width=width)
