"""RMVPE as a method: its clock, threshold and file, and so-vits-svc's contour."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from models.f0.rmvpe import decode_rmvpe, load_rmvpe
from stages.f0 import F0Config, estimate_f0
from stages.f0.rmvpe import rmvpe
from stages.f0.sovits_compat import SOVITS_METHODS
from stages.resample import ResampleConfig, resample
from stages.types import Array
from tests.helpers.checkpoints import tiny_rmvpe_weights

RATE = 44100


def noise(num_samples: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 0.1, num_samples).astype(np.float32)


def settings(path: Path, **changes: object) -> F0Config:
    return F0Config(method="rmvpe", checkpoint=str(path), **changes)  # type: ignore[arg-type]


def saliences(path: Path, wav: Array, sample_rate: int) -> torch.Tensor:
    peers = ResampleConfig(backend="torchaudio", lowpass_filter_width=128)
    heard = resample(wav, sample_rate, 16000, peers)
    (salience,) = load_rmvpe(path).salience([torch.from_numpy(heard)])
    return salience


@pytest.mark.parametrize("sample_rate", [16000, 44100, 48000])
def test_a_track_has_a_frame_every_10_ms_from_sample_0(sample_rate: int, tiny_rmvpe: Path) -> None:
    wavs = [noise(sample_rate), noise(1), noise(sample_rate // 2 + 7)]
    tracks = list(rmvpe(wavs, sample_rate, settings(tiny_rmvpe)))
    assert [len(f0) for f0, _ in tracks] == [101, 1, 51]
    for f0, positions in tracks:
        assert f0.dtype == np.float64
        np.testing.assert_allclose(positions, np.arange(len(f0)) * sample_rate / 100, rtol=1e-12)
    expected = decode_rmvpe(saliences(tiny_rmvpe, wavs[2], sample_rate), 0.03)
    np.testing.assert_allclose(tracks[2][0], expected, rtol=1e-6)


def test_the_threshold_is_the_papers_or_the_settings(tiny_rmvpe: Path) -> None:
    wav = noise(RATE)
    peaks = saliences(tiny_rmvpe, wav, RATE).amax(dim=1)
    middle = float(peaks.median())
    ((f0, _),) = rmvpe([wav], RATE, settings(tiny_rmvpe, voicing_threshold=middle))
    voiced = (peaks > middle).numpy()
    clear = (peaks - middle).abs().numpy() > 1e-5
    np.testing.assert_array_equal((f0 > 0)[clear], voiced[clear])
    assert 0 < voiced.sum() < len(voiced)


def test_the_default_threshold_lies_at_0_03(tmp_path: Path) -> None:
    """A network whose salience is the same everywhere: just above, then just below."""
    for level, voiced in ((0.031, True), (0.029, False)):
        state = tiny_rmvpe_weights()
        state["fc.1.weight"] = torch.zeros_like(state["fc.1.weight"])
        state["fc.1.bias"] = torch.full((360,), level).logit()
        torch.save(state, tmp_path / "flat.pt")
        ((f0, _),) = rmvpe([noise(16000)], 16000, settings(tmp_path / "flat.pt"))
        assert (f0 > 0).all() if voiced else not f0.any()


def test_the_references_contour_is_stretched_and_above_0_05(
    tiny_rmvpe: Path, tmp_path: Path
) -> None:
    wav = noise(RATE + 321)
    expected = decode_rmvpe(saliences(tiny_rmvpe, wav, RATE), 0.05).numpy()
    n_frames = len(wav) // 512
    found = SOVITS_METHODS["rmvpe"](wav, RATE, settings(tiny_rmvpe, align="peer"), n_frames)
    at = np.arange(n_frames) * len(expected) // n_frames
    np.testing.assert_allclose(found, expected[at], rtol=1e-6)
    state = tiny_rmvpe_weights()
    state["fc.1.weight"] = torch.zeros_like(state["fc.1.weight"])
    state["fc.1.bias"] = torch.full((360,), 0.04).logit()
    torch.save(state, tmp_path / "flat.pt")
    flat = settings(tmp_path / "flat.pt", align="peer", f0_min=10.0, f0_max=5000.0)
    assert not estimate_f0(wav, RATE, flat).any()
    assert estimate_f0(wav, RATE, settings(tmp_path / "flat.pt", f0_min=10.0, f0_max=5000.0)).any()


def test_the_file_is_read_when_the_method_is_called(tmp_path: Path, tiny_rmvpe: Path) -> None:
    """Also without a clip, so that a run fails before it starts."""
    with pytest.raises(ValueError, match="does not exist"):
        rmvpe([], 16000, settings(tmp_path / "absent.pt"))
    with pytest.raises(ValueError, match="is a folder"):
        rmvpe([], 16000, settings(tmp_path))
    (tmp_path / "other.pt").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"other\.pt is a web page"):
        rmvpe([], 16000, settings(tmp_path / "other.pt"))
    assert list(rmvpe([], 16000, settings(tiny_rmvpe))) == []


def test_another_file_in_its_place_is_another_network(tmp_path: Path, tiny_rmvpe: Path) -> None:
    path = tmp_path / "rmvpe.pt"
    wav = noise(8000)
    shutil.copy(tiny_rmvpe, path)
    ((first, _),) = rmvpe([wav], 16000, settings(path))
    state = tiny_rmvpe_weights()
    state["fc.1.bias"] = state["fc.1.bias"].flip(0) * 5
    torch.save(state, tmp_path / "new.pt")
    (tmp_path / "new.pt").replace(path)
    ((second, _),) = rmvpe([wav], 16000, settings(path))
    assert (first != second).any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_cuda_is_refused_where_there_is_none(tiny_rmvpe: Path) -> None:
    with pytest.raises(ValueError, match=r"device is cuda"):
        rmvpe([], 16000, settings(tiny_rmvpe, device="cuda"))
