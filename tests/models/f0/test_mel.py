"""The log-mel of the pitch networks, against librosa and torch's own STFT."""

from __future__ import annotations

import librosa
import numpy as np
import pytest
import torch

from models.f0 import mel
from models.f0.mel import f0_log_mel, f0_mel_filters


@pytest.mark.parametrize("scale, f_min, f_max", [("slaney", 0, 8000), ("htk", 30, 8000)])
def test_filters_are_librosas(scale: str, f_min: float, f_max: float) -> None:
    theirs = librosa.filters.mel(
        sr=16000, n_fft=1024, n_mels=128, fmin=f_min, fmax=f_max, htk=scale == "htk"
    )
    ours = f0_mel_filters(scale, f_min, f_max).numpy()  # type: ignore[arg-type]
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-8)  # of a peak of 0.05


def test_log_mel(monkeypatch: pytest.MonkeyPatch) -> None:
    wav = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)) * 0.1
    wav[:, 4000:] = 0
    filters = f0_mel_filters("htk", 30, 8000)
    window = torch.hann_window(1024)
    spectrum = torch.stft(wav, 1024, 160, window=window, center=False, return_complex=True)
    expected = (filters @ spectrum.abs()).clamp(min=1e-5).log().transpose(1, 2)
    found = f0_log_mel(wav, filters)
    assert found.shape == (2, (8000 - 1024) // 160 + 1, 128)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    monkeypatch.setattr(mel, "_BLOCK_FRAMES", 7)
    torch.testing.assert_close(f0_log_mel(wav, filters), found, rtol=0, atol=1e-5)
    torch.testing.assert_close(f0_log_mel(wav[0], filters), found[0], rtol=0, atol=1e-5)
