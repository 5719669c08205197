"""CREPE on clips: its clock, its batches, and the results of torchcrepe and so-vits-svc."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from models.f0.crepe import WINDOW, normalise
from models.torchaudio_compat import import_torchaudio
from stages.f0 import F0Config, estimate_f0
from stages.f0.crepe import (
    cost_notice,
    crepe,
    crepe_tiny,
    hz_of_bins,
    path_through,
    salience_of,
)
from stages.f0.networks import network as network_of
from stages.f0.sovits_compat import _crepe_level_db, sovits_crepe
from stages.types import Array

RATE = 44100
TINY = F0Config(method="crepe-tiny")
PEER = F0Config(method="crepe", align="peer")
NOISE_CENTS = 20.0  # torchcrepe adds up to this much to the pitch of a frame


def voice(f0: NDArray[np.floating], sample_rate: int) -> Array:
    phase = 2 * np.pi * np.cumsum(f0) / sample_rate
    noise = np.random.default_rng(0).normal(size=len(f0))
    wav = sum(np.sin(k * phase) / k for k in range(1, 7)) + 1e-3 * noise
    return (0.2 * wav).astype(np.float32)


def glide(seconds: float, low: float = 180.0, high: float = 330.0, rate: int = RATE) -> Array:
    return voice(np.geomspace(low, high, int(seconds * rate)), rate)


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The package torchcrepe."""
    import_torchaudio()
    import torchcrepe

    return torchcrepe


# The clock


def test_positions_are_whole_samples_at_16_khz_next_to_the_frames() -> None:
    wav = glide(0.3)
    ((f0, positions),) = crepe_tiny([wav], RATE, TINY)
    assert len(f0) == len(positions) == -(-len(wav) // 512)
    at_16_khz = positions * 16000 / RATE
    np.testing.assert_allclose(at_16_khz, np.rint(at_16_khz), atol=1e-9)
    assert np.abs(positions - 512 * np.arange(len(positions))).max() <= RATE / 16000 / 2


def test_a_hop_below_a_sample_at_16_khz_hears_each_of_them_once() -> None:
    wav = glide(0.02)
    ((_, at),) = crepe_tiny([wav], RATE, replace(TINY, hop_length=2))
    np.testing.assert_allclose(np.diff(at), RATE / 16000)
    assert len(at) == 320
    assert np.isfinite(estimate_f0(wav, RATE, replace(TINY, hop_length=2, f0_min=150))).all()


def test_a_window_is_centred_on_its_sample() -> None:
    network = network_of("crepe-tiny", TINY)
    wav = glide(0.2, rate=16000)
    centres = np.array([0.0, 700.0, 3199.0, 3200.0])
    (found,) = salience_of(network, [wav], [centres])
    padded = np.pad(wav, WINDOW // 2)
    windows = np.stack([padded[int(at) : int(at) + WINDOW] for at in centres])
    expected = network(normalise(torch.from_numpy(windows)))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("hop_ms", [5.0, 31.3])
def test_its_own_hop(hop_ms: float) -> None:
    wav = glide(0.5)
    cfg = replace(TINY, crepe_hop_ms=hop_ms)
    ((f0, positions),) = crepe_tiny([wav], RATE, cfg)
    assert len(f0) == np.ceil(500 / hop_ms)
    np.testing.assert_allclose(positions / RATE * 1000, np.arange(len(f0)) * hop_ms, atol=0.04)
    dense, sparse = estimate_f0(wav, RATE, TINY), estimate_f0(wav, RATE, cfg)
    assert dense.shape == sparse.shape
    inner = slice(4, -4)
    assert np.abs(1200 * np.log2(dense[inner] / sparse[inner])).max() < 25


def test_the_full_network_is_within_a_few_cents() -> None:
    wav = glide(0.3, 220, 240, 16000)
    ((f0, positions),) = crepe([wav], 16000, F0Config(method="crepe", hop_length=320))
    truth = np.geomspace(220, 240, len(wav))[positions.astype(int)]
    assert np.abs(1200 * np.log2(f0[2:-2] / truth[2:-2])).max() < 10


def test_a_range_beyond_the_bins_is_unvoiced() -> None:
    """Bin 0 is 31.7 Hz, the last one 2006 Hz."""
    wav = glide(0.2)
    for low, high in ((2500.0, 4000.0), (10.0, 20.0)):
        assert not estimate_f0(wav, RATE, replace(TINY, f0_min=low, f0_max=high)).any()
    assert estimate_f0(wav, RATE, replace(TINY, f0_min=10, f0_max=4000)).all()


# Batches


def test_a_clip_does_not_depend_on_the_others() -> None:
    lengths = [1, 40 * 16000, 700, 16000, 185, 8001]
    wavs = [glide(40, rate=16000)[:n] for n in lengths]
    centres = [np.arange(0.0, n, 1600) for n in lengths]
    network = network_of("crepe-tiny", TINY)
    together = list(salience_of(network, wavs, centres))
    assert len(together) == len(wavs)
    for wav, at, found in zip(wavs, centres, together, strict=True):
        (alone,) = salience_of(network, [wav], [at])
        assert found.shape == (len(at), 360)
        np.testing.assert_allclose(found, alone, atol=1e-5)


def test_no_clips() -> None:
    assert list(crepe_tiny([], RATE, TINY)) == []


def test_the_network_is_kept() -> None:
    tiny = network_of("crepe-tiny", replace(TINY, device="cpu"))
    assert tiny is network_of("crepe-tiny", replace(TINY, device="auto" if no_gpu() else "cpu"))
    assert tiny is not network_of("crepe", replace(TINY, device="cpu"))


def no_gpu() -> bool:
    return not torch.cuda.is_available()


# torchcrepe's numbers


@pytest.mark.slow
def test_pitch_before_torchcrepes_noise(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batch of all frames, without the noise, against the start of so-vits-svc's contour."""
    wav = np.concatenate([glide(0.3, rate=16000), np.zeros(1600, np.float32)])
    monkeypatch.setattr(theirs.convert, "dither", lambda cents: cents)
    pitch, periodicity = theirs.predict(
        torch.from_numpy(wav)[None], 16000, 160, 50.0, 1100.0, "tiny", return_periodicity=True
    )
    centres = np.arange(0.0, len(wav) + 1, 160)
    (salience,) = salience_of(network_of("crepe-tiny", TINY), [wav], [centres])
    bins, ours = path_through(salience, 50.0, 1100.0)
    np.testing.assert_allclose(ours, periodicity[0], atol=1e-5)
    np.testing.assert_allclose(hz_of_bins(bins), pitch[0], rtol=1e-5)


@pytest.mark.parametrize("num_samples", [217, 3000])
def test_level_is_torchcrepes_loudness(num_samples: int, theirs: Any) -> None:
    wav = glide(0.2, rate=16000)[:num_samples] * np.geomspace(1, 1e-4, num_samples, dtype="f4")
    with (
        np.errstate(divide="ignore"),
        pytest.warns(UserWarning) if num_samples < 1024 else _quiet(),
    ):
        expected = theirs.loudness.a_weighted(torch.from_numpy(wav)[None], 16000, 185)[0]
    np.testing.assert_allclose(_crepe_level_db(wav, 185), expected, atol=1e-3)


def _quiet() -> Any:
    import contextlib

    return contextlib.nullcontext()


# so-vits-svc's numbers: tests/golden/preprocessing/README.md


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, NDArray[Any]]:
    with np.load(golden / "preprocessing" / "f0.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture(scope="module")
def five_seconds(golden: Path) -> Array:
    with np.load(golden / "preprocessing" / "inputs.npz") as arrays:
        return np.asarray(arrays["vocadito_3to8s"] / 32768, np.float32)


def assert_same_but_for_the_noise(
    ours: NDArray[np.floating], theirs: NDArray[np.floating], voiced: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Same frames voiced; the difference in cents, no larger than the noise."""
    np.testing.assert_array_equal(ours > 0, voiced)
    difference = 1200 * np.log2(ours[voiced] / theirs[voiced].astype(np.float64))
    assert np.abs(difference).max(initial=0.0) < NOISE_CENTS + 0.1
    return np.asarray(difference)


@pytest.mark.slow
@pytest.mark.parametrize(
    "hop_length, extra_frames, case",
    [
        (512, 0, "hop512_plenNone"),
        (512, 2, "hop512_plen+2"),
        (512, -2, "hop512_plen-2"),
        (441, 0, "hop441_plenNone"),
    ],
)
def test_reference_contour(
    hop_length: int,
    extra_frames: int,
    case: str,
    reference: dict[str, NDArray[Any]],
    five_seconds: Array,
) -> None:
    """The noise has a standard deviation of 8.2 cents, the mean of three frames of 4.7, and more
    where fewer of them are voiced; it is centred."""
    frames = len(five_seconds) // hop_length + extra_frames
    cfg = replace(PEER, hop_length=hop_length)
    f0 = estimate_f0(five_seconds, RATE, cfg, frames)
    theirs = f"vocadito_3to8s/sr44100_{case}/crepe"
    difference = assert_same_but_for_the_noise(
        f0, reference[f"{theirs}/f0"], reference[f"{theirs}/uv"] == 1
    )
    assert 4 < difference.std() < 6.5
    assert abs(difference.mean()) < 1.5


def test_reference_contour_of_the_whole_recording(
    reference: dict[str, NDArray[Any]], real_audio: Path
) -> None:
    """Three paths of up to 1024 frames; the means of the noise leave 0.1 cents."""
    wav, _ = soundfile.read(real_audio / "vocadito_1.flac", dtype="float32")
    theirs = "vocadito_full/sr44100_hop512_plenNone/crepe"
    difference = assert_same_but_for_the_noise(
        estimate_f0(wav, RATE, PEER), reference[f"{theirs}/f0"], reference[f"{theirs}/uv"] == 1
    )
    assert 4 < difference.std() < 6.5
    assert abs(difference.mean()) < 0.6


@pytest.mark.parametrize("case", ["silence2s", "noise2s_-80dB", "len2048", "len600"])
def test_reference_contour_of_degenerate_clips(
    case: str, reference: dict[str, NDArray[Any]], five_seconds: Array
) -> None:
    noise = (np.random.default_rng(5).normal(size=2 * RATE) * 1e-4).astype(np.float32)
    start = 220500 - 132300  # sample 220500 of the recording
    wav = {
        "silence2s": np.zeros(2 * RATE, np.float32),
        "noise2s_-80dB": noise,
        "len2048": five_seconds[start : start + 2048],
        "len600": five_seconds[start : start + 600],
    }[case]
    theirs = f"{case}/sr44100_hop512_plenNone/crepe"
    f0 = estimate_f0(wav, RATE, PEER)
    assert_same_but_for_the_noise(f0, reference[f"{theirs}/f0"], reference[f"{theirs}/uv"] == 1)


def test_reference_contour_of_hardly_any_samples() -> None:
    wav = np.full(2, 0.1, np.float32)
    np.testing.assert_array_equal(sovits_crepe(wav, RATE, PEER, 3), np.zeros(3))
    with pytest.raises(ValueError, match=r"f0\.hop_length 2 is too short"):
        sovits_crepe(wav, RATE, replace(PEER, hop_length=2), 3)


# What it costs


@pytest.mark.parametrize(
    "cfg, on_gpu, said",
    [
        (F0Config(method="crepe"), False, "about 21 CPU seconds for a minute"),
        (F0Config(method="crepe", crepe_hop_ms=5), False, "about 48 CPU seconds for a minute"),
        (F0Config(method="ensemble", ensemble=("praat", "crepe")), False, "crepe-tiny"),
        (F0Config(method="crepe", crepe_hop_ms=16), False, None),
        (F0Config(method="crepe"), True, None),
        (F0Config(method="crepe-tiny"), False, None),
        (F0Config(method="praat"), False, None),
    ],
)
def test_cost_is_said(cfg: F0Config, on_gpu: bool, said: str | None) -> None:
    notice = cost_notice(cfg, on_gpu)
    assert (notice is None) if said is None else (notice is not None and said in notice)
