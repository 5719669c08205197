"""Spectrograms: so-vits-svc's results, independent clips, and gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.synthesizer.config import MelConfig
from models.synthesizer.mel import mel_of, spectrogram
from tests.models.synthesizer.conftest import Reference

# Magnitudes are up to 117. On the reference's own kernels (AVX-512) ours are equal to it; kernels
# that add up in another order reach 2.3e-5 and 1.5e-5, as does the reference from float64.
SAME_KERNELS = torch.backends.cpu.get_cpu_capability() == "AVX512"
MAGNITUDES = 1e-5 if SAME_KERNELS else 1.2e-4
LOGARITHMS = 1e-5 if SAME_KERNELS else 1e-4

SMALL = MelConfig(n_fft=256, win_length=256, n_mels=20)


@pytest.fixture
def wav() -> torch.Tensor:
    return torch.randn(3, 10 * 64, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.mark.parametrize("samples", [11025, 12288])
def test_as_the_reference(samples: int, reference: Reference) -> None:
    arrays = reference("svc_functions")

    def expect(found: torch.Tensor, name: str, tolerance: float) -> None:
        expected = arrays[f"mel/{samples}/{name}"]
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance)

    spec = spectrogram(torch.from_numpy(arrays[f"mel/{samples}/in"]), MelConfig(), 512)
    expect(spec, "spec", MAGNITUDES)
    expect(mel_of(spec, MelConfig(), 44100), "mel80", LOGARITHMS)
    other = MelConfig(n_mels=128, f_min=40, f_max=16000)
    expect(mel_of(spec, other, 44100), "mel128_40_16000", LOGARITHMS)


def test_as_the_reference_on_a_recording(golden: Path) -> None:
    with np.load(golden / "preprocessing" / "inputs.npz") as arrays:
        second = arrays["vocadito_3to8s"][220500 - 132300 : 264600 - 132300]
    with np.load(golden / "preprocessing" / "volume_expand_coarse_spec.npz") as arrays:
        expected = arrays["spec/vocadito_5to6s/n2048_hop512"]
    wav = torch.from_numpy((second / 32768).astype(np.float32)).unsqueeze(0)
    spec = spectrogram(wav, MelConfig(), 512)[0]
    np.testing.assert_allclose(spec.numpy(), expected, rtol=0, atol=MAGNITUDES)


def test_each_clip_is_as_if_it_were_alone(wav: torch.Tensor) -> None:
    lengths = torch.tensor([10, 7, 3])
    padded = wav.clone()
    for i, length in enumerate(lengths):
        padded[i, length * 64 :] = 9.0  # what is there must not be heard
    together = spectrogram(padded, SMALL, 64, lengths)
    for i, length in enumerate(lengths):
        alone = spectrogram(wav[i : i + 1, : length * 64], SMALL, 64)
        torch.testing.assert_close(together[i : i + 1, :, :length], alone, rtol=0, atol=1e-5)
        assert not together[i, :, length:].any()


def test_a_narrow_window_is_in_the_middle_of_its_frame() -> None:
    config = MelConfig(n_fft=256, win_length=64, n_mels=20)
    wav = torch.zeros(1, 640)
    wav[0, 5 * 64 + 32] = 1
    loud = spectrogram(wav, config, 64)[0].amax(0)
    assert loud.argmax() == 5
    assert loud[5] == pytest.approx(1, abs=1e-5)
    assert loud[[3, 7]].max() < 2e-3


@pytest.mark.parametrize("hop", [63, 64])
def test_a_frame_for_each_whole_hop(hop: int, wav: torch.Tensor) -> None:
    assert spectrogram(wav, SMALL, hop).shape == (3, 129, 640 // hop)
    with_lengths = spectrogram(wav, SMALL, hop, torch.tensor([10, 9, 5]))
    assert with_lengths.shape == (3, 129, 640 // hop)


def test_gradients_flow_even_through_silence(wav: torch.Tensor) -> None:
    wav = torch.cat([wav, torch.zeros(1, 640)]).requires_grad_()
    mel = mel_of(spectrogram(wav, SMALL, 64), SMALL, 44100)
    assert mel.shape == (4, 20, 10)
    mel.sum().backward()
    assert wav.grad is not None
    assert torch.isfinite(wav.grad).all()
    assert wav.grad[:3].abs().amin() > 0


def test_filters_that_inference_made_serve_training() -> None:
    config = MelConfig(n_fft=256, win_length=256, n_mels=17)  # of no other test
    with torch.inference_mode():
        mel_of(torch.ones(1, 129, 3), config, 44100)
    spec = torch.ones(1, 129, 3, requires_grad=True)
    mel_of(spec, config, 44100).sum().backward()
    assert spec.grad is not None and spec.grad.abs().sum() > 0


def test_too_short_for_a_mirror_image() -> None:
    with pytest.raises(ValueError, match=r"n_fft 256 .* more than 96 samples; this wav has 96"):
        spectrogram(torch.zeros(1, 96), SMALL, 64)
