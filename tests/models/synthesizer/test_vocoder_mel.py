"""Mels of vocoders: so-vits-svc's at every key and speed, and refused settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.synthesizer.config import MelConfig
from models.synthesizer.vocoder_mel import vocoder_mel
from tests.models.synthesizer.conftest import Reference

# Logarithms. On the reference's own kernels (AVX-512) ours are 4.8e-7 from it; kernels that add up
# in another order reach 2.6e-5, and the reference itself is 2.3e-5 from float64.
PEER = 1e-5 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1e-4

COMMUNITY = MelConfig(n_mels=128, f_min=40, f_max=16000)
SMALL = MelConfig(n_fft=256, win_length=256, n_mels=16, f_min=40)


@pytest.mark.parametrize("samples", [9000, 9216, 1500, 700])  # the last two have no mirror image
def test_as_the_reference(samples: int, reference: Reference) -> None:
    arrays = reference("nvstft_mel")
    start = f"community/{samples}/key"
    wav = torch.from_numpy(arrays[f"community/{samples}/in"]).unsqueeze(0)
    names = [name.removeprefix(start) for name in arrays if name.startswith(start)]
    assert len(names) == 7
    for name in names:
        key, speed = map(float, name.split("_speed"))
        found = vocoder_mel(wav, COMMUNITY, 44100, 512, key_shift=key, speed=speed)
        np.testing.assert_allclose(found.numpy(), arrays[start + name], rtol=0, atol=PEER)


def test_as_the_reference_at_another_rate(reference: Reference) -> None:
    arrays = reference("nvstft_mel")
    config = MelConfig(n_fft=1024, win_length=1024, n_mels=80, f_min=20, f_max=11025)
    found = vocoder_mel(torch.from_numpy(arrays["default/in"])[None], config, 22050, 256)
    np.testing.assert_allclose(found.numpy(), arrays["default/out"], rtol=0, atol=PEER)


def test_a_tone_moves_up_by_its_key() -> None:
    time = torch.arange(8192) / 16000
    low, high = (torch.sin(2 * torch.pi * f * time).unsqueeze(0) for f in (440.0, 880.0))
    config = MelConfig(n_fft=1024, win_length=1024, n_mels=64)
    moved = vocoder_mel(low, config, 16000, 256, key_shift=12)
    expected = vocoder_mel(high, config, 16000, 256)
    assert moved.shape == expected.shape
    inner = slice(4, -4)  # the mirror images of the two at the ends differ
    torch.testing.assert_close(
        moved.amax(1)[:, inner], expected.amax(1)[:, inner], rtol=0, atol=0.05
    )
    assert torch.equal(moved.argmax(1)[:, inner], expected.argmax(1)[:, inner])


@pytest.mark.parametrize("samples", [1, 63, 64, 65, 129, 640])
def test_frames_of_short_wavs(samples: int) -> None:
    mel = vocoder_mel(torch.zeros(2, samples), SMALL, 16000, 64)
    assert mel.shape == (2, 16, max(1, samples // 64))
    assert torch.isfinite(mel).all()


def test_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        vocoder_mel(torch.zeros(1, 0), SMALL, 16000, 64)
    with pytest.raises(ValueError, match=r"256 samples cannot have a hop of 320 \(speed 5\)"):
        vocoder_mel(torch.zeros(1, 640), SMALL, 16000, 64, speed=5)
